//! The operator's own tests on a GPU, as lines of text:
//! `cargo run --release -p tercet-attention --example selftest_cuda -- [--long] [PART…] [FOLDER…]`;
//! folders hold golden cases, numbers say which parts to run (all, when there is none).

use std::path::Path;
use std::process::ExitCode;

use tercet_attention::cuda::Gpu;
use tercet_attention::selftest::{Golden, cuda_parts};

fn main() -> ExitCode {
    let mut long = false;
    let mut golden = Vec::new();
    let mut wanted: Vec<usize> = Vec::new();
    for argument in std::env::args().skip(1) {
        match &argument[..] {
            "--long" => long = true,
            other => match other.parse() {
                Ok(part) => wanted.push(part),
                Err(_) => golden.extend(read(Path::new(other))),
            },
        }
    }
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    println!("{}, {} golden cases", gpu.info().name, golden.len());
    let (mut rows, mut failed) = (0, 0);
    let start = std::time::Instant::now();
    for (i, (name, part)) in cuda_parts(&gpu, &golden, long).into_iter().enumerate() {
        if !wanted.is_empty() && !wanted.contains(&i) {
            continue;
        }
        println!("part {i}: {name}");
        part(&mut |row| {
            rows += 1;
            failed += usize::from(!row.pass);
            println!("{:7.2} s {row}", start.elapsed().as_secs_f64());
        });
    }
    println!("{failed} of {rows} failed");
    ExitCode::from(u8::from(failed > 0))
}

/// The golden cases of a folder.
fn read(folder: &Path) -> Vec<Golden> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = files.filter_map(|file| {
        let name = file.file_name().into_string().ok()?;
        name.strip_suffix(".input.safetensors").map(str::to_owned)
    });
    names
        .filter_map(|name| {
            let bytes = |end: &str| std::fs::read(folder.join(format!("{name}.{end}.safetensors")));
            let (input, expected) = (bytes("input").ok()?, bytes("expected").ok()?);
            Golden::read(&name, &input, &expected).map_err(|e| eprintln!("{e}")).ok()
        })
        .collect()
}
