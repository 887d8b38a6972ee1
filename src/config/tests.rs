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
    assert_eq!(config.self_check, Some(Duration::from_secs(300)));
    assert_eq!(config.log.filter, "info");
}

#[test]
fn each_flag_reaches_the_config() {
    let config = serve(
        "--listen [::1]:1 --database-url postgres://u:p@h/d --no-migrate --poll-interval 50ms --roles a,b,c \
         --default-role a --admin-role c --cache-capacity 7 --max-staleness 2s --retain-changes 24h \
         --self-check 1s --reflection=false --log-format json --log-level warn,rolecache=debug",
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
    assert_eq!(config.self_check, Some(Duration::from_secs(1)));
    assert_eq!(config.log, LogOptions { format: LogFormat::Json, filter: "warn,rolecache=debug".into() });
    assert_eq!(serve("--self-check 0s").unwrap().self_check, None);
    assert_eq!(serve("--cache complete").unwrap().cache, cache::Mode::Complete);
    assert!(serve("--reflection").unwrap().reflection);
}

#[test]
fn doors_and_limits_reach_the_config() {
    let config = serve("").unwrap();
    assert_eq!(config.doors, DoorConfig { credentials: None, tls: None, danger: None });
    assert_eq!((config.limits.streams, config.limits.message_bytes), (256, 256 * 1024));
    assert_eq!(config.limits.handshake, Duration::from_secs(10));
    let config = serve(
        "--listen 0.0.0.0:1 --credentials c --tls-cert t --tls-key k --tls-client-ca a --tls-client-auth optional \
         --max-connections 1 --max-streams 2 --max-calls 3 --max-calls-per-second 4 --max-calls-per-caller 7 --max-watches 5 \
         --max-watches-per-caller 6 --max-message-bytes 1024 --max-header-bytes 1025 --max-deadline 1s \
         --handshake-timeout 2s --keepalive-interval 3s --idle-timeout 4s",
    )
    .unwrap();
    let client_ca = Some(grpc::ClientCa { file: "a".into(), required: false });
    let tls = Some(grpc::TlsOptions { certificate: "t".into(), key: "k".into(), client_ca });
    assert_eq!(config.doors, DoorConfig { credentials: Some("c".into()), tls, danger: None });
    let [deadline, handshake, keepalive, idle] = [1, 2, 3, 4].map(Duration::from_secs);
    let limits = grpc::Limits {
        connections: 1,
        streams: 2,
        calls: 3,
        watches: 5,
        message_bytes: 1_024,
        header_bytes: 1_025,
        deadline,
        handshake,
        keepalive,
        idle,
    };
    assert_eq!(config.limits, limits);
    assert_eq!(config.allowance, Allowance { calls_per_second: std::num::NonZeroU32::new(4), calls: 7, watches: 6 });
    assert_eq!(serve("--max-calls-per-second 0").unwrap().allowance.calls_per_second, None);
}

#[test]
fn what_others_can_reach_has_doors_or_a_warning() {
    for (flags, danger) in [
        ("--listen [::1]:1 --insecure", None),
        ("--listen 0.0.0.0:1 --insecure", Some("everybody who reaches")),
        ("--listen 0.0.0.0:1 --insecure --tls-cert t --tls-key k", Some("everybody who reaches")),
        ("--listen 0.0.0.0:1 --insecure --credentials c", Some("in the clear")),
        ("--listen 0.0.0.0:1 --credentials c --tls-cert t --tls-key k", None),
    ] {
        let told = serve(flags).expect(flags).doors.danger;
        assert!(told.is_some() == danger.is_some() && told.unwrap_or("").contains(danger.unwrap_or("")), "{flags}");
    }
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
        ("--self-check 500ms", "--self-check (ROLECACHE_SELF_CHECK) must be 1s to 1day, not 500ms"),
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
        ("--listen 0.0.0.0:1", "and so needs --tls-cert, --tls-key and --credentials; --insecure does without"),
        ("--listen [::]:1 --credentials c", "and so needs --tls-cert and --tls-key"),
        ("--listen 10.0.0.1:1 --tls-cert t --tls-key k", "and so needs --credentials"),
        ("--tls-cert t", "--tls-key <FILE>"),
        ("--tls-key k", "--tls-cert <FILE>"),
        ("--tls-client-ca a", "--tls-cert <FILE>"),
        ("--max-streams 0", "--max-streams (ROLECACHE_MAX_STREAMS) must be 1 to 1000000, not 0"),
        ("--max-message-bytes 1023", "--max-message-bytes (ROLECACHE_MAX_MESSAGE_BYTES) must be 1024 to 4194304"),
        ("--max-header-bytes 2000000", "--max-header-bytes (ROLECACHE_MAX_HEADER_BYTES) must be 1024 to 1048576"),
        ("--handshake-timeout 61s", "--handshake-timeout (ROLECACHE_HANDSHAKE_TIMEOUT) must be 1s to 1m, not 1m 1s"),
        ("--log-level rolecache=loud", "--log-level (ROLECACHE_LOG_LEVEL) must be a level"),
        ("--log-format xml", "--log-format <FORMAT>"),
        ("--reflection=maybe", "--reflection"),
        ("--database-url mysql://u:secret@h/d", "--database-url (ROLECACHE_DATABASE_URL) must begin with postgres://"),
        ("--database-url postgresql+asyncpg://u:secret@h/d", "names a Python driver too: write postgresql://"),
        ("--database-url postgres://u:secret@h:port/d", "--database-url (ROLECACHE_DATABASE_URL) is no URL"),
        ("--database-url password=secret,hostaddr=fe80::1", "must begin with postgres:// or sqlite://"),
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
