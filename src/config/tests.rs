use clap::Parser;

use super::*;

#[derive(Parser)]
struct Serve {
    #[command(flatten)]
    args: ServeArgs,
}

fn serve(flags: &str) -> Result<ServeConfig, String> {
    let flags = ["serve"].into_iter().chain(flags.split_whitespace());
    let parsed = Serve::try_parse_from(flags).map_err(|error| error.to_string())?;
    parsed.args.validate().map_err(|error| error.to_string())
}

#[test]
fn without_flags_it_serves_an_sqlite_file_on_the_loopback_address() {
    let config = serve("").unwrap();
    assert_eq!(config.listen.to_string(), "127.0.0.1:50051");
    assert!(config.store.migrate && config.reflection);
    assert_eq!(config.cache, cache::Mode::Lazy { capacity: None });
    assert_eq!(config.roles.iter().map(RoleName::as_str).collect::<Vec<_>>(), ["user", "admin"]);
    assert_eq!(config.poll_interval, Duration::from_millis(500));
    assert_eq!(config.max_staleness, Duration::from_secs(60));
    assert_eq!(config.retain_changes, 30 * 24 * HOUR);
    assert_eq!(config.log.filter, "info");
}

#[test]
fn each_flag_reaches_the_config() {
    let config = serve(
        "--listen [::1]:1 --database-url postgres://u:p@h/d --no-migrate --poll-interval 50ms --roles a,b,c \
         --default-role a --admin-role c --cache-capacity 7 --max-staleness 2s --retain-changes 24h \
         --reflection=false --log-format json --log-level warn,rolecache=debug",
    )
    .unwrap();
    assert_eq!(config.listen.to_string(), "[::1]:1");
    assert_eq!(config.store.url, "postgres://u:p@h/d");
    assert_eq!((config.store.default_role.as_str(), config.store.admin_role.as_str()), ("a", "c"));
    assert!(!config.store.migrate && !config.reflection);
    assert_eq!(config.cache, cache::Mode::Lazy { capacity: Some(7) });
    assert_eq!(config.roles.len(), 3);
    assert_eq!(config.poll_interval, Duration::from_millis(50));
    assert_eq!((config.max_staleness, config.retain_changes), (Duration::from_secs(2), 24 * HOUR));
    assert_eq!(config.log, LogOptions { format: LogFormat::Json, filter: "warn,rolecache=debug".into() });
    assert_eq!(serve("--cache complete").unwrap().cache, cache::Mode::Complete);
    assert!(serve("--reflection").unwrap().reflection);
}

#[test]
fn a_wrong_setting_is_named_with_what_it_accepts() {
    for (flags, sentence) in [
        ("--listen localhost", "--listen <ADDR:PORT>': give an IP address and a port"),
        ("--poll-interval 9ms", "--poll-interval (ROLECACHE_POLL_INTERVAL) must be 10ms to 1s, not 9ms"),
        ("--poll-interval 2s", "--poll-interval (ROLECACHE_POLL_INTERVAL) must be 10ms to 1s, not 2s"),
        ("--poll-interval soon", "--poll-interval <DURATION>"),
        ("--max-staleness 1s", "--max-staleness (ROLECACHE_MAX_STALENESS) must be 2s to 1day, not 1s"),
        ("--retain-changes 23h", "--retain-changes (ROLECACHE_RETAIN_CHANGES) must be 1day to 100years, not 23h"),
        ("--cache complete --cache-capacity 5", "--cache-capacity (ROLECACHE_CACHE_CAPACITY) bounds a lazy cache"),
        ("--cache some", "--cache <MODE>"),
        ("--cache-capacity=-1", "--cache-capacity"),
        ("--roles user,Admin", "--roles (ROLECACHE_ROLES) is a comma-separated list, and in it \"Admin\" is no role"),
        ("--roles user,,admin", "a role must not be empty"),
        ("--roles user,admin,user", "names user twice"),
        ("--roles user,helper", "--admin-role (ROLECACHE_ADMIN_ROLE) must be one of --roles"),
        ("--default-role guest", "--default-role (ROLECACHE_DEFAULT_ROLE) must be one of --roles"),
        ("--default-role admin", "--default-role (ROLECACHE_DEFAULT_ROLE) must differ from --admin-role"),
        ("--admin-role é", "--admin-role (ROLECACHE_ADMIN_ROLE) is no role: a role has only"),
        ("--log-level rolecache=loud", "--log-level (ROLECACHE_LOG_LEVEL) must be a level"),
        ("--log-format xml", "--log-format <FORMAT>"),
        ("--reflection=maybe", "--reflection"),
        ("--database-url mysql://u:secret@h/d", "--database-url (ROLECACHE_DATABASE_URL) must begin with postgres://"),
        ("--database-url postgresql+asyncpg://u:secret@h/d", "names a Python driver too: write postgresql://"),
        ("--database-url postgres://u:secret@h:port/d", "--database-url (ROLECACHE_DATABASE_URL) is no URL"),
        ("--database-url /tmp/roles.db", "must begin with postgres:// or sqlite://"),
        ("--database-url sqlite://", "must name a file"),
        ("--database-url sqlite::memory:", "must name a file"),
        ("--database-url sqlite://a.db?mode=ro", "must name a file alone"),
    ] {
        let error = serve(flags).expect_err(flags);
        assert!(error.contains(sentence), "{flags}\n  said: {error}\n  not: {sentence}");
        assert!(!error.contains("secret"), "{flags} tells a password: {error}");
    }
}
