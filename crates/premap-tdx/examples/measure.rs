//! Prints the sections and the MRTDs of OVMF images: `cargo run --example measure -- OVMF.fd`.

use std::process::ExitCode;

use premap_tdx::{Image, Rules, Tdvf, measure};

fn main() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for file in std::env::args().skip(1) {
        if let Err(error) = show(&file) {
            eprintln!("{file}: {error}");
            code = ExitCode::FAILURE;
        }
    }
    code
}

fn show(file: &str) -> Result<(), Box<dyn std::error::Error>> {
    let image = Image::new(std::fs::read(file)?);
    let tdvf = Tdvf::parse(&image)?;
    println!("{file}: descriptor at {:#x}", tdvf.offset());
    for section in tdvf.sections() {
        println!("  {:12} {} {:?}", section.kind(), section.memory(), section.attributes());
    }
    for rules in Rules::all(tdvf.sections()) {
        let measured = measure(tdvf.sections(), rules);
        println!("  {} {rules}: {} adds, {} extends", measured.mrtd, measured.adds, measured.extends);
    }
    Ok(())
}
