//! Where the file is, and what can be said of it before SQLite opens it.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use super::open::refuse;
use crate::store::OpenError;

/// `sqlite://relative`, `sqlite:///absolute`; the rest of the text is the path as it is.
pub(super) fn path_of(url: &str) -> Result<PathBuf, OpenError> {
    let path = url.strip_prefix("sqlite://").or_else(|| url.strip_prefix("sqlite:")).unwrap_or_default();
    if path.is_empty() || path.starts_with(':') || path.starts_with("file:") || path.contains('?') {
        return refuse(format!("{url} names no file: write sqlite://rolecache.db or sqlite:///srv/bot/rolecache.db"));
    }
    Ok(PathBuf::from(path))
}

/// Where nothing has to be opened to know that it cannot work.
pub(super) fn refuse_place(path: &Path, migrate: bool) -> Result<(), OpenError> {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    };
    if !directory.is_dir() {
        return refuse(format!("the directory {} does not exist", directory.display()));
    }
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => refuse(format!("{} is not a file", path.display())),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !migrate => {
            refuse(format!("there is no database {}: run `rolecache migrate` first", path.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => refuse(format!("{} cannot be read: {error}", path.display())),
    }
}

/// Must come before any connection of this process: closing the handle drops SQLite's locks on the file.
pub(super) fn refuse_contents(path: &Path) -> Result<(), OpenError> {
    let file = match std::fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return refuse(format!("{} cannot be written: {error}", path.display())),
    };
    let mut head = Vec::new();
    if let Err(error) = file.take(16).read_to_end(&mut head) {
        return refuse(format!("{} cannot be read: {error}", path.display()));
    }
    if !head.is_empty() && head != b"SQLite format 3\0" {
        return refuse(format!("{} is not an SQLite database", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_a_file() {
        for (url, path) in [
            ("sqlite://rolecache.db", "rolecache.db"),
            ("sqlite:///srv/bot.db", "/srv/bot.db"),
            ("sqlite:bot.db", "bot.db"),
            ("sqlite://./a b.db", "./a b.db"),
        ] {
            assert_eq!(path_of(url).expect("a path"), Path::new(path), "{url}");
        }
        for url in ["sqlite://", "sqlite::memory:", "sqlite://a.db?mode=ro", "postgres://x", ""] {
            assert!(path_of(url).is_err(), "{url}");
        }
    }
}
