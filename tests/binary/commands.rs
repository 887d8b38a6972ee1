//! Every client command, in text and as JSON, with its exit code.

use std::{
    io::Read,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::{
    process::{Process, answer, clean, finish, rolecache, run},
    support::server::Db,
};

on_both! { each_command_in_text, each_command_as_json, exit_codes_say_what_to_do }

/// The commands against one server.
struct To<'a>(&'a str);

impl To<'_> {
    #[track_caller]
    fn text(&self, line: &str) -> String {
        let mut args: Vec<&str> = line.split(' ').collect();
        args.extend(["--address", self.0]);
        answer(&args)
    }

    /// One line per message.
    #[track_caller]
    fn json(&self, line: &str) -> Value {
        let text = self.text(&format!("{line} --output json"));
        assert_eq!(text.lines().count(), 1, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    #[track_caller]
    fn fails(&self, line: &str) -> (i32, String) {
        let mut args: Vec<&str> = line.split(' ').collect();
        args.extend(["--address", self.0]);
        let (code, out, err) = run(&args);
        assert_eq!(out, "", "{line}");
        (code, err)
    }
}

async fn each_command_in_text(db: Db) {
    let server = Process::serve(&db.url(), &[]);
    let address = server.ready();
    let to = To(&address);
    assert_eq!(to.text("get 42"), "user\n");
    assert_eq!(to.text("set 42 admin --username @bob --reason on-call"), "42 is now admin (new user), revision 1\n");
    assert_eq!(to.text("set 42 admin"), "42 is admin already, revision 1\n");
    assert_eq!(to.text("get 42 -7 --fresh"), "42\tadmin\n-7\tuser\n");
    assert_eq!(to.text("mailbox register 7 42"), "mailbox 7 belongs to 42\n");
    assert_eq!(to.text("mailbox get 7"), "42\n");
    // Numbers may be skipped, and SQLite skips one for a mailbox.
    let moved = to.text("transfer 42 43 --mailbox 7 --demote --to-username @eve");
    let revision: i64 = moved.trim_end().rsplit(' ').next().unwrap().parse().unwrap();
    assert_eq!(
        moved,
        format!("43 is now admin (new user), revision {revision}\n42 is now user (was admin), revision {revision}\n")
    );
    let next = revision + 1;
    assert_eq!(to.text("mailbox get 7"), "43\n");
    assert_eq!(to.text("delete 42"), format!("42 is deleted (was user), revision {next}\n"));
    assert_eq!(to.text("delete 42"), format!("42 was not there, revision {next}\n"));
    assert_eq!(to.text(&format!("get 43 --min-revision {next}")), "admin\n");
    let table = |text: String| -> Vec<String> {
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    assert_eq!(table(to.text("users")), ["USER ROLE USERNAME", "43 admin eve"]);
    assert_eq!(table(to.text("users --role user")), ["USER ROLE USERNAME"]);
    let history = table(to.text("history 42"));
    assert_eq!(history[0], "REVISION TIME WHAT USER ROLE BY");
    assert!(history[1].ends_with("admin added 42 @bob - -> admin anonymous: on-call"), "{history:?}");
    assert!(history[2].contains(" admin removed 42 @bob admin -> user anonymous"), "{history:?}");
    assert!(history[3].contains(" user deleted 42 @bob user -> - anonymous"), "{history:?}");
    let stats = to.text("stats");
    for row in ["users in cache", "hits", "misses", "hit rate", "changes applied", "handlers", "feed"] {
        assert!(stats.contains(row), "{row} is not in\n{stats}");
    }
    let (code, out, err) = run(&["users", "--limit", "1", "--address", &address]);
    assert_eq!((code, out.lines().count(), &*err), (0, 2, ""));
    to.text("set 44 admin");
    let (_, out, err) = run(&["users", "--limit", "1", "--address", &address]);
    assert_eq!((out.lines().count(), &*err), (2, "there are more: --all, or a larger --limit, shows them\n"));
    assert_eq!(to.text("users --all").lines().count(), 3);
    assert_eq!(to.text("healthcheck"), "SERVING\n");
    let events = to.text("watch --after 0 --count 2");
    let events: Vec<&str> = events.lines().collect();
    assert_eq!(events.len(), 3);
    assert!(
        events[0].starts_with("     1  ") && events[0].ends_with("- -> admin  by anonymous: on-call"),
        "{events:?}"
    );
    assert!(events[1].contains("  admin transferred  43 @eve "), "{events:?}");
    let snapshot = run(&["watch", "--after", "0", "--count", "4", "--address", &address]);
    assert_eq!(snapshot.1.lines().count(), 5);
    assert!(snapshot.2.contains("watch: resumed after revision 0\n"), "{}", snapshot.2);
    assert!(snapshot.2.contains("to go on from here: --after "), "{}", snapshot.2);
}

async fn each_command_as_json(db: Db) {
    let server = Process::serve(&db.url(), &[]);
    let address = server.ready();
    let to = To(&address);
    assert_eq!(
        to.text("get 42 --output json"),
        "{\"userId\":\"42\",\"role\":\"user\",\"revision\":\"0\",\"source\":\"SOURCE_STORE\",\"stale\":false}\n"
    );
    let set = to.json("set 42 admin --username bob --reason why");
    let at = set["change"]["changedAt"].clone();
    assert!(at.as_str().unwrap().ends_with('Z'));
    let change = json!({
        "revision": "1", "userId": "42", "oldRole": "", "newRole": "admin", "kind": "CHANGE_KIND_ADMIN_ADDED",
        "origin": "ORIGIN_RPC", "username": "bob", "actor": "anonymous", "reason": "why", "changedAt": at, "index": 0,
    });
    assert_eq!(set, json!({ "change": change, "revision": "1" }));
    assert_eq!(to.json("set 42 admin"), json!({ "revision": "1" }));
    assert_eq!(
        to.json("get 42 7"),
        json!({ "roles": ["admin", "user"], "roleIndexes": [0, 1], "revision": "1", "stale": false })
    );
    assert_eq!(to.json("mailbox register 7 42"), json!({}));
    assert_eq!(to.json("mailbox get 7"), json!({ "mailboxId": "7", "creatorId": "42" }));
    let moved = to.json("transfer 42 43 --mailbox 7 --demote");
    let revision: i64 = moved["revision"].as_str().unwrap().parse().unwrap();
    assert_eq!((revision > 1, moved["changes"].as_array().unwrap().len()), (true, 2));
    let last = json!((revision + 1).to_string());
    let transfer = json!({ "fromUserId": "42", "toUserId": "43", "mailboxId": "7" });
    assert_eq!((&moved["changes"][0]["transfer"], &moved["changes"][1]["transfer"]), (&transfer, &transfer));
    assert_eq!(moved["changes"][0]["kind"], "CHANGE_KIND_ADMIN_TRANSFERRED");
    let deleted = to.json("delete 42");
    assert_eq!(
        (&deleted["change"]["kind"], &deleted["change"]["newRole"]),
        (&json!("CHANGE_KIND_USER_DELETED"), &json!(""))
    );
    assert_eq!(to.json("delete 42"), json!({ "revision": last }));
    assert_eq!(
        to.json("users"),
        json!({ "users": [{ "userId": "43", "role": "admin", "username": "" }], "nextPageToken": "", "revision": last })
    );
    let history = to.json("history");
    assert_eq!((&history["changes"][0], &history["nextPageToken"]), (&change, &json!("")));
    assert_eq!(history["changes"].as_array().unwrap().len(), 4);
    let stats = to.json("stats");
    for (field, value) in [("eventsProcessed", json!("4")), ("eventHandlers", json!("0")), ("revision", last)] {
        assert_eq!(stats[field], value, "{field}");
    }
    assert_eq!(
        (&stats["feedState"], &stats["version"]),
        (&json!("FEED_STATE_LIVE"), &json!(env!("CARGO_PKG_VERSION")))
    );
    assert_eq!(to.json("healthcheck"), json!({ "status": "SERVING" }));
    let text = to.text("watch --after 0 --count 1 --output json");
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.len(), 2);
    assert_eq!(
        (&events[0]["started"]["resumed"], &events[0]["started"]["defaultRole"]),
        (&json!(true), &json!("user"))
    );
    let commit = &events[1]["commit"];
    assert_eq!(
        (&commit["revision"], &commit["changes"], &commit["partial"]),
        (&json!("1"), &json!([change]), &json!(false))
    );
    assert!(!commit["resumeToken"].as_str().unwrap().is_empty());
}

async fn exit_codes_say_what_to_do(db: Db) {
    let mut server = Process::serve(&db.url(), &[]);
    let address = server.ready();
    let to = To(&address);
    for (line, code, sentence) in [
        ("get 0", 1, "(INVALID_FIELD)"),
        ("set 42 king", 1, "(UNKNOWN_ROLE)"),
        ("set 42 admin --expect admin", 1, "(ROLE_MISMATCH)"),
        ("transfer 42 43", 1, "(NOT_AN_ADMIN)"),
        ("mailbox get 7", 1, "(MAILBOX_NOT_FOUND)"),
        ("history --after 9", 1, "(REVISION_UNKNOWN)"),
        ("watch --after x", 1, "(INVALID_FIELD)"),
        ("healthcheck --service bot.v1.Nobody", 3, ""),
        ("get bob", 2, "invalid value 'bob'"),
        ("get", 2, "required"),
        ("users --limit 0", 2, "--limit"),
        ("get 1 --timeout 0s", 2, "--timeout"),
        ("get 1 --output xml", 2, "--output"),
        ("watch --kind gone", 2, "--kind"),
        ("watch --heartbeat soon", 2, "--heartbeat"),
        ("dance", 2, "unrecognized subcommand"),
    ] {
        if line.starts_with("healthcheck") {
            let (said, out, _) = run(&[line.split(' ').collect(), vec!["--address", &address]].concat());
            assert_eq!((said, &*out), (code, "SERVICE_UNKNOWN\n"));
            continue;
        }
        let (said, err) = to.fails(line);
        assert_eq!(said, code, "{line}: {err}");
        assert!(err.contains(sentence) && err.starts_with("error: "), "{line}: {err}");
    }
    server.stop("TERM");
    for line in ["get 1", "set 1 admin", "stats", "users", "watch", "healthcheck", "delete 1", "mailbox get 1"] {
        let (code, err) = to.fails(line);
        assert_eq!(code, 3, "{line}: {err}");
        assert!(err.contains(&format!("cannot connect to http://{address}")), "{line}: {err}");
    }
}

/// Every flag of `serve`, with its default, is in the README's table.
#[test]
fn the_table_of_settings_is_whole() {
    let readme = include_str!("../../README.md");
    let (_, settings) = readme.split_once("## Settings").expect("the README has settings");
    let with_commas = |number: &str| {
        let digits = number.bytes().rev().enumerate().flat_map(|(n, digit)| {
            let comma = (n > 0 && n % 3 == 0).then_some(b',');
            comma.into_iter().chain([digit])
        });
        let reversed: Vec<u8> = digits.collect();
        reversed.into_iter().rev().map(char::from).collect::<String>()
    };
    let help = answer(&["serve", "--help"]);
    let mut flags = 0;
    for part in help.split("\n      --").skip(1) {
        let flag = part.split(|char: char| !(char.is_ascii_lowercase() || char == '-')).next().unwrap();
        let row = settings.lines().find(|row| row.starts_with('|') && row.contains(&format!("`--{flag}`")));
        let row = row.unwrap_or_else(|| panic!("--{flag} is not in the table"));
        flags += 1;
        let Some((_, default)) = part.split_once("[default: ") else { continue };
        let default = default.split(']').next().unwrap();
        let is_number = default.len() > 3 && default.bytes().all(|byte| byte.is_ascii_digit());
        let told = if is_number { with_commas(default) } else { default.to_owned() };
        assert!(row.contains(&told), "--{flag} is {told} by default, not as in: {row}");
    }
    assert!(flags > 25, "{flags} flags");
}

#[test]
fn each_command_has_help_that_names_its_flags() {
    let client = ["--address", "--timeout", "--output", "ROLECACHE_ADDRESS"];
    let store = ["--database-url", "--default-role", "--admin-role", "--log-format", "--log-level", "DATABASE_URL"];
    let serve = [
        "--listen",
        "--no-migrate",
        "--poll-interval",
        "--roles",
        "--cache",
        "--cache-capacity",
        "--max-staleness",
        "--retain-changes",
        "--reflection",
        "ROLECACHE_LISTEN",
        "127.0.0.1:50051",
        "SIGTERM",
    ];
    for (command, flags) in [
        ("serve", [&store[..], &serve].concat()),
        ("migrate", store.to_vec()),
        ("get", [&client[..], &["--min-revision", "--fresh", "<USER>..."]].concat()),
        ("set", [&client[..], &["--username", "--expect", "--reason", "--request-id"]].concat()),
        ("transfer", [&client[..], &["--mailbox", "--demote", "--to-username", "--reason", "--request-id"]].concat()),
        ("delete", [&client[..], &["--reason", "--request-id"]].concat()),
        ("mailbox register", client.to_vec()),
        ("mailbox get", client.to_vec()),
        ("users", [&client[..], &["--role", "--limit", "--all"]].concat()),
        ("history", [&client[..], &["--after", "--limit", "--all"]].concat()),
        ("stats", client.to_vec()),
        (
            "watch",
            [&client[..], &["--after", "--snapshot", "--user", "--role", "--kind", "--heartbeat", "--count"]].concat(),
        ),
        (
            "bench",
            [&client[..], &["--connections", "--in-flight", "--rate", "--duration", "--users", "--skew", "--batch"]]
                .concat(),
        ),
        ("healthcheck", [&client[..], &["--service"]].concat()),
        ("completions", vec!["bash", "zsh", "fish"]),
    ] {
        let args: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        let help = answer(&args);
        for flag in flags {
            assert!(help.contains(flag), "{flag} is not in the help of {command}:\n{help}");
        }
    }
    let (code, _, err) = run(&[]);
    assert_eq!(code, 2);
    assert!(err.contains("Exit codes: 0 done, 1 refused"), "{err}");
    assert_eq!(answer(&["--version"]), format!("rolecache {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_for_each_shell() {
    for (shell, sign) in [("bash", "complete -F"), ("zsh", "#compdef rolecache"), ("fish", "complete -c rolecache")] {
        let script = answer(&["completions", shell]);
        assert!(script.contains(sign) && script.contains("healthcheck"), "{shell}");
    }
    let parsed = Command::new("bash").args(["-nc", &answer(&["completions", "bash"])]).output().unwrap();
    assert!(parsed.status.success(), "{}", crate::process::said(&parsed));
}

/// What is measured is for benchmarks to say; that it is measured, for this.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_puts_each_load_on_a_server() {
    let db = Db::sqlite();
    let server = Process::serve(&db.url(), &[]);
    let address = server.ready();
    let to = To(&address);
    let pid = std::process::id();
    let few =
        format!("--duration 300ms --connections 2 --in-flight 3 --users 20 --batch 7 --watchers 5 --server-pid {pid}");
    for (load, at_most) in [
        ("get", None),
        ("get --skew 1.1", None),
        ("get --rate 100", Some(30)),
        ("batch", None),
        ("set", None),
        ("mixed", None),
        ("watch --rate 50", Some(5 * 15)),
    ] {
        let told = to.json(&format!("bench {load} {few}"));
        let count = told["count"].as_u64().unwrap();
        assert!(count > 0 && at_most.is_none_or(|most| count <= most), "{load}: {told}");
        assert!(told["failures"].as_object().unwrap().is_empty(), "{load}: {told}");
        let times = ["p50", "p99", "p999", "max"].map(|name| told[name].as_f64().unwrap());
        assert!(times[0] > 0.0 && times.is_sorted(), "{load}: {told}");
        assert!(told["serverCpu"].is_number(), "{load}: {told}");
        assert_eq!(told["usersPerSecond"].is_number(), load == "batch", "{load}: {told}");
    }
    let text = to.text(&format!("bench get {few}"));
    let begin: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(begin, ["calls", "latency", "processor"], "{text}");
    // Each write is one.
    let told = to.json("bench set --duration 300ms --connections 1 --in-flight 1 --users 1 --first-user 5");
    assert!(told["count"].as_u64() > Some(0), "{told}");
    assert!(db.sql("select count(*) from rolecache_changes where user_id = 5").parse::<u64>().unwrap() > 1);
    for (line, sentence) in [
        ("bench get --skew 11", "--skew must be 0 to 10"),
        ("bench get --first-user 0", "--first-user must be positive"),
        ("bench get --server-pid 4194305", "/proc/4194305/stat cannot be read"),
    ] {
        let (code, err) = to.fails(line);
        assert!(code == 2 && err.contains(sentence), "{line}: {err}");
    }
}

/// Who reads our output and has enough of it ends us, without a word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_pipe_is_a_quiet_end() {
    let db = Db::sqlite();
    let server = Process::serve(&db.url(), &[]);
    let address = server.ready();
    db.sql(
        "with recursive n (i) as (select 1 union all select i + 1 from n where i < 3000)
            insert into users (user_id, role) select i, 'admin' from n",
    );
    answer(&["get", "1", "--min-revision", "3000", "--address", &address]);
    for args in [
        &["users", "--all", "--address", &address][..],
        &["users", "--all", "--output", "json", "--address", &address],
        &["history", "--all", "--address", &address],
        &["watch", "--after", "0", "--address", &address],
        &["completions", "bash"],
    ] {
        let mut child = rolecache(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = [0; 1];
        child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        drop(child.stdout.take());
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{args:?}: {err}");
        assert!(!err.contains("error") && !err.contains("panic") && !err.contains("Broken"), "{args:?}: {err}");
    }
}

/// The address comes from the environment too, and the flag wins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_environment_is_read() {
    let db = Db::sqlite();
    let mut command = rolecache(["serve"]);
    command.env("DATABASE_URL", db.url()).env("ROLECACHE_LISTEN", "127.0.0.1:0").env("ROLECACHE_ROLES", "user,admin,x");
    // Set and empty, as a compose file leaves it, is not set.
    command.env("ROLECACHE_DATABASE_URL", "").env("ROLECACHE_LOG_FORMAT", "json").env("ROLECACHE_NO_MIGRATE", "false");
    command.env("ROLECACHE_CACHE", "complete").current_dir(db.file().parent().unwrap());
    let server = Process::spawn(&mut command);
    let address = server.ready();
    assert!(db.file().exists(), "DATABASE_URL names the store: {}", server.err.text());
    assert!(!db.file().with_file_name("rolecache.db").exists());
    server.err.until(|line| line.contains("cache: complete"));
    let (code, out, _) = finish(rolecache(["set", "1", "x"]).env("ROLECACHE_ADDRESS", &address));
    assert_eq!((code, &*out), (0, "1 is now x (new user), revision 1\n"));
    let mut wrong = clean(Command::new(crate::process::BINARY), ["get", "1", "--address", &address]);
    let (code, out, _) = finish(wrong.env("ROLECACHE_ADDRESS", "127.0.0.1:1"));
    assert_eq!((code, &*out), (0, "x\n"));
}
