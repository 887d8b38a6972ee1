//! The contract as Rust, compiled by `build.rs`, and its descriptors for reflection and JSON.

pub mod v1 {
    #![allow(clippy::pedantic, unreachable_pub)]
    tonic::include_proto!("rolecache.v1");
}

// The RPCs of the contract, by name.
include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// The contract and everything that it imports, as a `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/rolecache.bin"));
