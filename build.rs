//! Compiles the contract to Rust, without protoc.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const PROTO: &str = "proto/rolecache/v1/rolecache.proto";
    println!("cargo:rerun-if-changed={PROTO}");
    println!("cargo:rerun-if-changed=migrations");
    let descriptors = protox::compile([PROTO], ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("rolecache.bin"), prost::Message::encode_to_vec(&descriptors))?;
    std::fs::write(out.join("methods.rs"), methods(&descriptors))?;
    let mut config = tonic_prost_build::Config::new();
    // Names by which a message finds its descriptor, for `--output json`.
    config.enable_type_names();
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}

/// The RPCs of the contract as an enum: what is decided for each of them is decided in a `match`, so that a new one does
/// not compile before it is decided for.
fn methods(descriptors: &prost_types::FileDescriptorSet) -> String {
    let services = descriptors.file.iter().flat_map(|file| &file.service);
    let names: Vec<&str> = services.flat_map(|service| &service.method).map(|method| method.name()).collect();
    let mut code = String::from("#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]\npub enum Method {\n");
    let mut line = |text: String| {
        code.push_str(&text);
        code.push('\n');
    };
    names.iter().for_each(|name| line(format!("    {name},")));
    line(format!("}}\nimpl Method {{\n    pub const ALL: [Self; {}] = [", names.len()));
    names.iter().for_each(|name| line(format!("        Self::{name},")));
    line("    ];\n    pub fn of(name: &str) -> Option<Self> {\n        match name {".into());
    names.iter().for_each(|name| line(format!("            \"{name}\" => Some(Self::{name}),")));
    line(
        "            _ => None,\n        }\n    }\n    pub fn as_str(self) -> &'static str {\n        match self {"
            .into(),
    );
    names.iter().for_each(|name| line(format!("            Self::{name} => \"{name}\",")));
    line("        }\n    }\n}".into());
    code
}
