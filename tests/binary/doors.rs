//! Doors as operators meet them: callers made and listed, servers that refuse half a lock, and secrets that stay secret.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use serde_json::Value;

use crate::{
    process::{Process, finish, rolecache, run},
    support::{
        doors::{Ca, House, certificate, token},
        server::Db,
    },
};

/// What a command said on stdout, and on stderr.
#[track_caller]
fn said(args: &[&str]) -> (String, String) {
    let (code, out, err) = run(args);
    assert_eq!(code, 0, "{args:?}: {err}");
    (out, err)
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn tokens_are_made_and_listed() {
    let house = House::new();
    let file = house.path("new.toml");
    let new = ["token", "new", "shop-bot", "--scope", "read", "--scope", "watch", "--credentials", &file];
    let (secret, talk) = said(&new);
    let secret = secret.trim_end();
    assert!(secret.starts_with("rolecache_") && secret.len() == 53 && !secret.contains('\n'), "{secret}");
    assert!(talk.contains("shop-bot") && talk.contains("read, watch") && !talk.contains(secret), "{talk}");
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = fs::read_to_string(&file).unwrap();
    assert!(!text.contains(secret), "only its hash is kept");

    // Beside it, without a newline at the end of what was there, and with remarks.
    fs::write(&file, format!("# ours\n{}", text.trim_end())).unwrap();
    let (another, _) = said(&["token", "new", "shop-bot", "--scope", "read,write:moderator", "--credentials", &file]);
    assert_ne!(another.trim_end(), secret);
    let by_name = ["token", "new", "job", "--scope", "list", "--certificate", "job.internal", "--credentials", &file];
    assert_eq!(said(&by_name).0, "", "a certificate needs no secret");
    assert!(fs::read_to_string(&file).unwrap().starts_with("# ours\n"));

    let (list, _) = said(&["token", "list", "--credentials", &file]);
    let list = lines(&list);
    assert_eq!(list[0], "NAME KIND KNOWN BY SCOPES");
    assert!(list[1].starts_with("shop-bot token ") && list[1].ends_with(" read, watch"), "{list:?}");
    assert!(list[2].ends_with(" read, write:moderator"), "{list:?}");
    assert_eq!(list[3], "job certificate job.internal list");
    let (json, _) = said(&["token", "list", "--credentials", &file, "--output", "json"]);
    let first: Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!((&first["name"], &first["kind"]), (&"shop-bot".into(), &"token".into()));
    assert_eq!(first["knownBy"].as_str().unwrap().len(), 8);
    assert_eq!(json.lines().count(), 3);

    let before = fs::read_to_string(&file).unwrap();
    for (args, code, sentence) in [
        (&["new", "two words", "--scope", "read"][..], 2, "NAME: a name has"),
        (&["new", "anonymous", "--scope", "read"], 2, "is not \"anonymous\""),
        (&["new", "a", "--scope", "reed"], 2, "\"reed\" is no scope"),
        (&["new", "a", "--scope", "write:Admin"], 2, "in \"write:Admin\""),
        (&["new", "a"], 2, "--scope"),
        (&["new", "a", "--scope", "read", "--certificate", "job.internal"], 1, "another caller has the same"),
        (&["new", "a", "--scope", "read", "--certificate", ""], 1, "must be a DNS name or a URI"),
    ] {
        let (exit, out, err) = run(&[&["token"], args, &["--credentials", &file]].concat());
        assert_eq!((exit, &*out), (code, ""), "{args:?}: {err}");
        assert!(err.contains(sentence), "{args:?}: {err}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), before);
    fs::write(&file, "[[caller]]\nname = 7\n").unwrap();
    for args in [&["token", "list"][..], &["token", "new", "a", "--scope", "read"]] {
        let (exit, out, err) = run(&[args, &["--credentials", &file]].concat());
        assert_eq!((exit, &*out), (1, ""), "{err}");
        assert!(err.contains("new.toml: line 2: expected a string"), "{err}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "[[caller]]\nname = 7\n");
}

/// A server with TLS on a file of the test's.
fn behind_doors(house: &House, db: &Db, more: &[&str]) -> Process {
    let [cert, key, ca, credentials] =
        ["server.pem", "server.key", "clients.pem", "credentials.toml"].map(|name| house.path(name));
    let args = ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &ca, "--credentials", &credentials];
    Process::serve(&db.url(), &[&args, more].concat())
}

/// The commands reach a server by what is in their flags and files and in the environment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_go_through_the_doors() {
    let (house, db) = (House::new(), Db::sqlite());
    house.admit(&[token("bot", "sesame", "read write"), certificate("job", "job.test", "read")]);
    let client = house.clients.sign(&["job.test"]);
    house.write("client.pem", &client.certificate);
    house.write("client.key", &client.key);
    house.write("ca.pem", &house.servers.pem);
    house.write("token", "sesame\n");
    house.write("wrong", "sesam");
    let server = behind_doors(&house, &db, &["--tls-client-auth", "optional"]);
    let address = format!("https://{}", server.address());
    server.err.until(|line| line.contains("ready"));
    let [ca, cert, key, good, wrong] =
        ["ca.pem", "client.pem", "client.key", "token", "wrong"].map(|name| house.path(name));
    let to = |line: &str, more: &[&str]| {
        let mut args: Vec<&str> = line.split(' ').collect();
        args.extend(["--address", &address, "--tls-ca", &ca]);
        args.extend(more);
        rolecache(args)
    };
    let token = ["--token-file", &good];
    assert_eq!(finish(&mut to("healthcheck", &[])).1, "SERVING\n", "health is open");
    let (_, out, err) = finish(&mut to("set 42 admin", &token));
    assert_eq!(out, "42 is now admin (new user), revision 1\n", "{err}");
    assert_eq!(finish(to("get 42", &[]).env("ROLECACHE_TOKEN", "sesame")).1, "admin\n");
    assert_eq!(finish(&mut to("get 42", &["--tls-cert", &cert, "--tls-key", &key])).1, "admin\n");
    let by_environment = finish(
        rolecache(["get", "42"])
            .env("ROLECACHE_ADDRESS", &address)
            .env("ROLECACHE_TLS_CA", &ca)
            .env("ROLECACHE_TLS_SERVER_NAME", "localhost")
            .env("ROLECACHE_TOKEN_FILE", &good)
            // A file counts for more than the variable.
            .env("ROLECACHE_TOKEN", "nothing"),
    );
    assert_eq!(by_environment.1, "admin\n", "{}", by_environment.2);

    for (mut command, code, sentence, hint) in [
        (to("get 42", &[]), 1, "(NO_CREDENTIALS)", "--token-file, or ROLECACHE_TOKEN"),
        (to("get 42", &["--token-file", &wrong]), 1, "(BAD_CREDENTIALS)", "does not know the token"),
        (to("stats", &token), 1, "lacks the scope stats", "add a scope to the caller"),
        (to("watch", &token), 1, "lacks the scope watch", "add a scope to the caller"),
        (to("get 42", &["--tls-server-name", "other.test"]), 3, "not valid for name", "--tls-ca names a file"),
        (rolecache(["get", "42", "--address", &address]), 3, "UnknownIssuer", "--tls-ca names a file"),
        (rolecache(["get", "42", "--address", &address[8..], "--tls-ca", &ca]), 2, "is for https:// addresses", ""),
        (to("get 42", &["--token-file", "/nowhere"]), 2, "--token-file: /nowhere cannot be read", ""),
    ] {
        let (exit, out, err) = finish(&mut command);
        assert_eq!((exit, &*out), (code, ""), "{err}");
        assert!(err.contains(sentence) && err.contains(hint) && !err.contains("sesam"), "{err}");
    }
    let (code, _, err) = finish(rolecache(["get", "1", "--address", "192.0.2.1:1"]).env("ROLECACHE_TOKEN", "sesame"));
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("ROLECACHE_TOKEN would send the token in the clear to 192.0.2.1"), "{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_lock_is_refused() {
    let (house, db) = (House::new(), Db::sqlite());
    house.admit(&[token("bot", "sesame", "read")]);
    house.write("other.key", &Ca::new("other").sign(&["other.test"]).key);
    house.write("empty.toml", "");
    house.write("broken.toml", "[[caller]]\nname = \"bot\"\ntoken = \"sesame\"\nscopes = [\"read\"]\n");
    house.write("empty.pem", "");
    let [cert, key, other, ca, credentials, empty, broken, no_pem] = [
        "server.pem",
        "server.key",
        "other.key",
        "clients.pem",
        "credentials.toml",
        "empty.toml",
        "broken.toml",
        "empty.pem",
    ]
    .map(|name| house.path(name));
    let url = db.url();
    let with_tls = ["--tls-cert", &cert, "--tls-key", &key];
    let table: [(&[&str], i32, &str); 13] = [
        (&["--tls-cert", &cert], 2, "--tls-key"),
        (&["--tls-key", &key], 2, "--tls-cert"),
        (&["--tls-client-ca", &ca, "--credentials", &credentials], 2, "--tls-cert"),
        (&[&with_tls[..], &["--tls-client-ca", &ca]].concat(), 2, "--credentials"),
        (&["--tls-cert", &cert, "--tls-key", &other], 1, "do not belong together"),
        (&["--tls-cert", &no_pem, "--tls-key", &key], 1, "there is no certificate in it"),
        (&["--tls-cert", &cert, "--tls-key", &cert], 1, "there is no private key in it"),
        (&["--tls-cert", &cert, "--tls-key", "/nowhere"], 1, "/nowhere cannot be read"),
        (
            &[&with_tls[..], &["--credentials", &credentials, "--tls-client-ca", &no_pem]].concat(),
            1,
            "there is no certificate in it",
        ),
        (&["--credentials", "/nowhere"], 1, "/nowhere cannot be read"),
        (&["--credentials", &empty], 1, "it has no caller in it"),
        (&["--credentials", &broken], 1, "there is a field that no caller has"),
        (&["--credentials", &cert], 1, "line 1"),
    ];
    for (flags, code, sentence) in table {
        let args = ["serve", "--database-url", &url, "--listen", "127.0.0.1:0", "--log-format", "json"];
        let (exit, out, err) = run(&[&args[..], flags].concat());
        assert_eq!((exit, &*out), (code, ""), "{flags:?}: {err}");
        assert!(err.contains(sentence) && !err.contains("sesame"), "{flags:?}: {err}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn off_loopback_open_doors_are_refused() {
    let (house, db) = (House::new(), Db::sqlite());
    house.admit(&[token("bot", "sesame", "read")]);
    let [cert, key, credentials] = ["server.pem", "server.key", "credentials.toml"].map(|name| house.path(name));
    let (tls, known) = (["--tls-cert", &cert, "--tls-key", &key], ["--credentials", &credentials]);
    let url = db.url();
    let serve = ["serve", "--database-url", &url, "--log-format", "json"];
    for (listen, flags, missing) in [
        ("0.0.0.0:0", &[][..], "needs --tls-cert, --tls-key and --credentials"),
        ("[::]:0", &tls[..], "needs --credentials"),
        ("0.0.0.0:0", &known[..], "needs --tls-cert and --tls-key"),
    ] {
        let (code, out, err) = run(&[&serve[..], &["--listen", listen], flags].concat());
        assert_eq!((code, &*out), (2, ""), "{err}");
        assert!(err.contains("--listen (ROLECACHE_LISTEN) is") && err.contains(missing), "{err}");
        assert!(err.contains("--insecure does without"), "{err}");
    }
    for (flags, warning) in [
        (&[][..], "everybody who reaches this address may read and write roles"),
        (&known[..], "tokens and roles travel in the clear"),
    ] {
        for _ in 0..2 {
            let flags = [flags, &["--listen", "0.0.0.0:0", "--insecure"]].concat();
            let mut server = Process::serve(&url, &flags);
            server.err.until(|line| line.contains("ready"));
            server.err.until(|line| line.contains("WARN") && line.contains(warning));
            server.stop("TERM");
        }
    }
    let mut server = Process::serve(&url, &[&tls[..], &known, &["--listen", "0.0.0.0:0"]].concat());
    server.err.until(|line| line.contains("ready"));
    assert!(!server.err.text().contains("WARN"), "{}", server.err.text());
    server.stop("TERM");
}

/// Arguments are anybody's to read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_in_the_arguments_is_warned_of() {
    let db = Db::postgres().await;
    let mut url = url::Url::parse(&db.url()).unwrap();
    url.set_password(Some("hush")).unwrap();
    let mut server = Process::serve(url.as_str(), &[]);
    server.ready();
    server.err.until(|line| line.contains("WARN") && line.contains("read the database's password"));
    assert!(!server.err.text().contains("hush"), "{}", server.err.text());
    server.stop("TERM");
    let mut elsewhere = rolecache(["serve", "--listen", "127.0.0.1:0", "--log-format", "json", "--log-level", "trace"]);
    let mut server = Process::spawn(elsewhere.env("ROLECACHE_DATABASE_URL", url.as_str()));
    let address = server.ready();
    let (code, _, err) = run(&["set", "42", "admin", "--address", &address]);
    assert_eq!(code, 0, "{err}");
    server.stop("TERM");
    let log = server.err.text();
    assert!(log.contains("TRACE") && !log.contains("WARN"), "a talkative log");
    // At no level.
    let told = log.lines().find(|line| line.contains("hush"));
    assert_eq!(told, None);
}

/// Nobody gets too much by a slip, and nobody is told why they may not write; the operator is.
#[test]
fn a_scope_of_no_role_is_warned_of() {
    let (house, db) = (House::new(), Db::sqlite());
    for (scope, warned) in [("write:admin", false), ("write:admim", true)] {
        house.admit(&[token("bot", "sesame", scope)]);
        let mut server = behind_doors(&house, &db, &[]);
        server.err.until(|line| line.contains("\"ready\""));
        server.stop("TERM");
        let log = server.err.text();
        let says = log.contains("bot has the scope of a role that no write may set");
        assert!(says == warned && !log.contains("admim"), "{scope}: {log}");
    }
}

/// In no line of the most talkative log, in no argument, in no help, in no error; with a client that marks the token as a
/// secret, and with one that does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_is_told_nobody() {
    let (house, db) = (House::new(), Db::sqlite());
    house.write("ca.pem", &house.servers.pem);
    let file = house.path("credentials.toml");
    let secret = said(&["token", "new", "bot", "--scope", "read,watch,write", "--credentials", &file]).0;
    let secret = secret.trim_end();
    let wrong = "rolecache_thisIsNoTokenOfThisServerAtAllAndNeverWasOne";
    let mut server = behind_doors(&house, &db, &["--tls-client-auth", "optional", "--log-level", "trace"]);
    let address = server.address();
    server.err.until(|line| line.contains("\"ready\""));
    let (https, ca) = (format!("https://{address}"), house.path("ca.pem"));
    let mut heard = String::new();
    for (shown, command) in [(secret, "get 42"), (secret, "set 42 admin"), (secret, "stats"), (wrong, "get 42")] {
        let mut args: Vec<&str> = command.split(' ').collect();
        args.extend(["--address", &https, "--tls-ca", &ca]);
        let (_, out, err) = finish(rolecache(args).env("ROLECACHE_TOKEN", shown).env("RUST_LOG", "trace"));
        heard += &(out + &err);
    }
    let channel = house.connect(address.parse().unwrap(), None).await.unwrap();
    for shown in [secret, wrong] {
        let mut rpc = crate::support::doors::rpc(channel.clone(), Some(shown));
        let outcome = rpc.get_role(rolecache::proto::v1::GetRoleRequest { user_id: 42, ..Default::default() }).await;
        assert_eq!(outcome.is_ok(), shown == secret);
        heard += &format!("{outcome:?}");
    }
    for args in [&["get", "--help"][..], &["serve", "--help"], &["token", "list", "--credentials", &file]] {
        heard += &finish(rolecache(args).env("ROLECACHE_TOKEN", secret)).1;
    }
    let arguments = Command::new("ps").args(["-e", "-o", "args"]).output().unwrap();
    heard += &String::from_utf8_lossy(&arguments.stdout);
    server.stop("TERM");
    let log = server.err.text();
    assert!(log.contains("TRACE") && log.lines().count() > 100, "a talkative log");
    for text in [&heard, &log] {
        for secret in [secret, wrong] {
            let line = text.lines().find(|line| line.contains(&secret[10..]));
            assert_eq!(line, None, "a secret is told");
        }
    }
}
