//! The campaigns, one file for each kind of fault.

mod checker_itself;
mod client_gone;
mod cold_user;
mod disk_full;
mod duplicates;
mod fill_against_commit;
mod history_rewritten;
mod listen_broken;
mod out_of_order;
mod plain_sql;
mod postgres_killed;
mod replica_cut_off;
mod replicas;
mod resumes;
mod server_killed;
mod sqlite_killed;
mod starting_together;
mod store_stuck;
mod stuck_watchers;
mod trimming;

pub use self::disk_full::with_private_mounts;
use super::campaign::Campaign;

/// In the order in which they run.
pub fn all() -> Vec<Campaign> {
    let kinds = [
        checker_itself::campaigns(),
        replicas::campaigns(),
        postgres_killed::campaigns(),
        server_killed::campaigns(),
        listen_broken::campaigns(),
        replica_cut_off::campaigns(),
        store_stuck::campaigns(),
        disk_full::campaigns(),
        sqlite_killed::campaigns(),
        history_rewritten::campaigns(),
        starting_together::campaigns(),
        out_of_order::campaigns(),
        fill_against_commit::campaigns(),
        client_gone::campaigns(),
        duplicates::campaigns(),
        resumes::campaigns(),
        trimming::campaigns(),
        stuck_watchers::campaigns(),
        cold_user::campaigns(),
        plain_sql::campaigns(),
    ];
    kinds.into_iter().flatten().collect()
}
