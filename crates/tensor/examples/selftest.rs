//! The ops' own test on the first CUDA device, or on the CPU when there is none.
//! `cargo run --release -p tercet-tensor --example selftest`

use tercet_cuda::Gpu;
use tercet_tensor::{Device, selftest};

fn main() {
    let device = match Gpu::open(0) {
        Ok(gpu) => {
            gpu.use_cache(std::env::args().nth(1).map(Into::into));
            Device::Cuda(gpu)
        }
        Err(e) => {
            println!("{e}");
            Device::Cpu
        }
    };
    let (mut count, mut failed) = (0, 0);
    selftest(&device, &mut |row| {
        count += 1;
        failed += usize::from(!row.pass);
        println!("{row}");
    });
    println!("{failed} of {count} failed on {device}");
    std::process::exit(i32::from(failed > 0));
}
