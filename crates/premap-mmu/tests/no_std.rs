//! The library stays `no_std`: a test where the bare-metal target can't be had.
//!
//! A crate that is `#![no_std]` can still name std through `extern crate`, or depend on a crate that needs it. Both are
//! looked at here: in the sources, every mention of std stands behind the `std` feature or a test; and the library is
//! compiled without default features in a crate of its own that forbids std from being linked by defining its own panic
//! handler, which fails with a duplicate as soon as std comes in.

use std::path::{Path, PathBuf};
use std::process::Command;

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("the crate's sources are readable") {
        let path = entry.expect("as is each entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn std_is_named_only_behind_its_feature() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    assert!(files.len() > 20);
    for file in files {
        let text = std::fs::read_to_string(&file).expect("sources are text");
        let mut gated = false;
        for (number, line) in text.lines().enumerate() {
            let code = line.trim_start();
            if code.starts_with("//") {
                continue;
            }
            gated |= code.contains("feature = \"std\"")
                || code.contains("#[cfg(test)]")
                || code.contains("cfg(all(test");
            let names_std = code.contains("std::") || code.contains("extern crate std");
            assert!(!names_std || gated, "{}:{}: std without its feature", file.display(), number + 1);
        }
    }
}

#[test]
fn the_library_links_without_std() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-std-check");
    std::fs::create_dir_all(folder.join("src")).expect("the target folder is writable");
    let library = env!("CARGO_MANIFEST_DIR");
    let manifest = format!(
        "[package]\nname = \"no-std-check\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
         [lib]\ncrate-type = [\"staticlib\"]\n\n\
         [dependencies]\npremap-mmu = {{ path = {library:?}, default-features = false }}\n\n\
         [profile.dev]\npanic = \"abort\"\n\n[workspace]\n"
    );
    let code = "#![no_std]\n\
        use premap_mmu::{Ept, Heap, Levels, PageTable};\n\
        struct None;\n\
        unsafe impl core::alloc::GlobalAlloc for None {\n\
            unsafe fn alloc(&self, _: core::alloc::Layout) -> *mut u8 { core::ptr::null_mut() }\n\
            unsafe fn dealloc(&self, _: *mut u8, _: core::alloc::Layout) {}\n\
        }\n\
        #[global_allocator]\n\
        static ALLOCATOR: None = None;\n\
        #[panic_handler]\n\
        fn panic(_: &core::panic::PanicInfo<'_>) -> ! { loop {} }\n\
        #[unsafe(no_mangle)]\n\
        pub extern \"C\" fn check() -> bool { PageTable::<Ept, _>::new(Heap, Levels::Four).is_ok() }\n";
    std::fs::write(folder.join("Cargo.toml"), manifest).expect("the target folder is writable");
    std::fs::write(folder.join("src/lib.rs"), code).expect("the target folder is writable");
    let output = Command::new(env!("CARGO"))
        .args(["build", "--offline", "--quiet", "--manifest-path"])
        .arg(folder.join("Cargo.toml"))
        .env("CARGO_TARGET_DIR", folder.join("target"))
        .env_remove("RUSTFLAGS")
        .output()
        .expect("cargo runs, since it runs this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
