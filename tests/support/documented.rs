//! The statements that `docs/postgresql.md` tells an operator to run.

const PAGE: &str = include_str!("../../docs/postgresql.md");

/// Those that begin with this comment.
pub fn documented(comment: &str) -> &'static str {
    let (_, rest) = PAGE.split_once(&format!("```sql\n-- {comment}")).expect("the page has these statements");
    let (_, statements) = rest.split_once('\n').unwrap();
    statements.split_once("```").unwrap().0
}
