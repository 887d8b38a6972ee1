//! What every user of the machine can read: the arguments of a process.

use url::Url;

/// Whether one of them is a database's URL with a password in it.
pub fn hold_a_password(arguments: impl IntoIterator<Item = String>) -> bool {
    arguments.into_iter().any(|argument| {
        let value = argument.strip_prefix("--database-url=").unwrap_or(&argument);
        Url::parse(value).is_ok_and(|url| {
            url.scheme().starts_with("postgres")
                && (url.password().is_some() || url.query_pairs().any(|(key, _)| key == "password"))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::hold_a_password;

    #[test]
    fn a_password_is_seen_wherever_it_stands() {
        for (arguments, has_one) in [
            ("serve --database-url postgres://bot:secret@db/bot", true),
            ("serve --database-url=postgresql://bot:secret@db/bot", true),
            ("migrate --database-url postgres://db/bot?user=bot&password=secret", true),
            ("serve --database-url postgres://bot@db/bot", false),
            ("serve --database-url sqlite://a:b@c", false),
            ("serve --cache complete", false),
        ] {
            assert_eq!(hold_a_password(arguments.split(' ').map(str::to_owned)), has_one, "{arguments}");
        }
    }
}
