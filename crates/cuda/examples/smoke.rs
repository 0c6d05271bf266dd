//! Asks a device for everything this crate can do and says what came out: run it first on a new
//! machine. `cargo run --release -p tercet-cuda --example smoke`

use std::path::Path;

use tercet_cuda::{
    Args, Error, Gpu, Kernel, Library, Matmul, Number, Result, Source, Swizzle, TensorMap,
    look_for, probe,
};

const TEXT: &str = r#"
#include "types.cuh"
KERNEL fill(float* y, float x, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x * FACTOR + (float)(i % 7);
}
KERNEL add(float* y, const float* x, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += x[i];
}
KERNEL much_shared(float* y) {
    extern __shared__ float scratch[];
    scratch[threadIdx.x * 97] = threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = scratch[(threadIdx.x ^ 1) * 97];
}
"#;
const SOURCE: Source = Source::new("smoke", TEXT);

struct Report {
    failures: usize,
}

impl Report {
    fn line(&mut self, what: &str, result: Result<String>) {
        match result {
            Ok(text) => println!("ok    {what}: {text}"),
            Err(e) => {
                self.failures += 1;
                println!("FAIL  {what}: {e}");
            }
        }
    }
}

fn wrong(text: impl Into<String>) -> Error {
    Error::Value(text.into())
}

fn factor() -> [(&'static str, String); 1] {
    [("FACTOR", "3.0f".into())]
}

fn over(n: usize) -> ([u32; 3], [u32; 3]) {
    ([n.div_ceil(256) as u32, 1, 1], [256, 1, 1])
}

fn fill(kernel: &Kernel, y: u64, x: f32, n: usize) -> Result<()> {
    let (grid, block) = over(n);
    // SAFETY: y holds n floats.
    unsafe { kernel.launch(grid, block, 0, Args::new().ptr(y).f32(x).len(n)) }
}

fn kernels(gpu: &Gpu) -> Result<String> {
    let n = 1_000_003;
    let y = gpu.alloc(n * 4)?;
    let kernel = gpu.kernel(&SOURCE, "fill", &factor())?;
    fill(&kernel, y.ptr(), 2.0, n)?;
    let mut host = vec![0f32; n];
    y.download(&mut host)?;
    if let Some(at) = (0..n).find(|&i| host[i] != 6.0 + (i % 7) as f32) {
        return Err(wrong(format!("{} at {at}", host[at])));
    }
    let wide = gpu.kernel(&SOURCE, "much_shared", &factor())?;
    // SAFETY: y holds more than 512 floats; 512·97·4 bytes are 198,656.
    unsafe { wide.launch([1, 1, 1], [512, 1, 1], 512 * 97 * 4, Args::new().ptr(y.ptr()))? };
    y.download(&mut host[..512])?;
    if (0..512).any(|i| host[i] != (i ^ 1) as f32) {
        return Err(wrong("shared memory beyond 48 KiB holds wrong numbers"));
    }
    if !matches!(gpu.kernel(&SOURCE, "absent", &factor()), Err(Error::Value(_))) {
        return Err(wrong("an entry that does not exist was found"));
    }
    Ok(format!("{} registers, {} B local", kernel.registers()?, kernel.local_bytes()?))
}

/// Small numbers whose products and sums are exact in every storage type used.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut x = seed;
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((x >> 16) % 5) as f32 - 2.0
    };
    (0..n).map(|_| next()).collect()
}

fn stored(x: &[f32], number: Number) -> Vec<u8> {
    x.iter()
        .flat_map(|x| match number {
            Number::F32 => x.to_le_bytes().to_vec(),
            Number::BF16 => x.to_le_bytes()[2..].to_vec(),
            // Exact for 0, ±1, ±2.
            Number::F16 => {
                let magnitude = [0u16, 0x3c00, 0x4000][x.abs() as usize];
                (magnitude | if *x < 0.0 { 0x8000 } else { 0 }).to_le_bytes().to_vec()
            }
        })
        .collect()
}

fn matmuls(gpu: &Gpu) -> Result<String> {
    let mut count = 0;
    for [m, n, k] in [[128, 256, 64], [37, 51, 19], [1, 513, 300], [300, 1, 77], [64, 64, 0]] {
        for input in [Number::F32, Number::BF16, Number::F16] {
            for (trans_a, trans_b) in [(false, false), (false, true), (true, false), (true, true)] {
                for (add, with_bias) in [(false, false), (true, false), (false, true)] {
                    if k == 0 && with_bias {
                        continue;
                    }
                    let (a, b, c) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * n, 3));
                    let bias = numbers(n, 4);
                    let (da, db) =
                        (gpu.upload(&stored(&a, input))?, gpu.upload(&stored(&b, input))?);
                    let (dc, dbias) = (gpu.upload(&c)?, gpu.upload(&bias)?);
                    let mut product = Matmul::new([m, n, k], input, da.ptr(), db.ptr(), dc.ptr());
                    product.output = Number::F32;
                    (product.trans_a, product.trans_b, product.add) = (trans_a, trans_b, add);
                    product.bias = if with_bias { dbias.ptr() } else { 0 };
                    // SAFETY: the buffers have the sizes said.
                    unsafe { gpu.matmul(&product)? };
                    let mut out = vec![0f32; m * n];
                    dc.download(&mut out)?;
                    for i in 0..m {
                        for j in 0..n {
                            let mut want = if add { c[i * n + j] } else { 0.0 };
                            want += if with_bias { bias[j] } else { 0.0 };
                            for l in 0..k {
                                let a = if trans_a { a[l * m + i] } else { a[i * k + l] };
                                let b = if trans_b { b[j * k + l] } else { b[l * n + j] };
                                want += a * b;
                            }
                            if out[i * n + j] != want {
                                return Err(wrong(format!(
                                    "{product:?}: {} instead of {want} at {i}, {j}",
                                    out[i * n + j]
                                )));
                            }
                        }
                    }
                    count += 1;
                }
            }
        }
    }
    Ok(format!("{count} products exact"))
}

fn f32_is_not_tf32(gpu: &Gpu) -> Result<String> {
    // TF32's 10 bits lose the 2⁻¹² of each factor, which makes 2⁻³ of the sum; f32 sums lose
    // less than 2⁻⁸ in any order.
    let x = 1.0 + 2f32.powi(-12);
    let (m, k) = (256, 256);
    let a = gpu.upload(&vec![x; m * k])?;
    let c = gpu.alloc(m * m * 4)?;
    // SAFETY: the buffers have the sizes said.
    unsafe { gpu.matmul(&Matmul::new([m, m, k], Number::F32, a.ptr(), a.ptr(), c.ptr()))? };
    let mut out = vec![0f32; m * m];
    c.download(&mut out)?;
    let want = 256.0 * f64::from(x) * f64::from(x);
    let error = out.iter().map(|y| (f64::from(*y) - want).abs()).fold(0.0, f64::max);
    if error > 2f64.powi(-8) {
        Err(wrong(format!("off by {error}")))
    } else {
        Ok(format!("off by {error:.1e}"))
    }
}

fn rates(gpu: &Gpu) -> Result<String> {
    let mut text = String::new();
    for (number, s) in [(Number::BF16, 8192), (Number::F32, 4096)] {
        let (a, b) = (gpu.alloc_zeroed(s * s * 4)?, gpu.alloc_zeroed(s * s * 4)?);
        let c = gpu.alloc(s * s * 4)?;
        let mut product = Matmul::new([s, s, s], number, a.ptr(), b.ptr(), c.ptr());
        product.trans_b = true;
        // SAFETY: the buffers are large enough.
        let run = || unsafe { gpu.matmul(&product) };
        run()?;
        let times = (0..5).map(|_| gpu.time(run)).collect::<Result<Vec<f32>>>()?;
        let best = times.into_iter().fold(f32::MAX, f32::min);
        let rate = 2.0 * (s as f64).powi(3) / f64::from(best) / 1e9;
        text += &format!("{number:?} {s}³ {best:.3} ms, {rate:.0} TFLOP/s (zeros); ");
    }
    Ok(text)
}

fn graphs(gpu: &Gpu) -> Result<String> {
    let n = 10_000;
    let kernel = gpu.kernel(&SOURCE, "fill", &factor())?;
    let add = gpu.kernel(&SOURCE, "add", &factor())?;
    let (grid, block) = over(n);
    let y = gpu.alloc_zeroed(n * 4)?;
    let early = gpu.upload(&vec![100f32; n])?;
    let (graph, kept) = gpu.capture(|| {
        let early = early;
        let kept = gpu.alloc(n * 4)?;
        for x in 0..4 {
            let scratch = gpu.alloc(n * 4)?;
            fill(&kernel, scratch.ptr(), x as f32, n)?;
            // SAFETY: both hold n floats.
            unsafe {
                add.launch(grid, block, 0, Args::new().ptr(y.ptr()).ptr(scratch.ptr()).len(n))?
            };
        }
        // SAFETY: all hold n floats.
        unsafe {
            add.launch(grid, block, 0, Args::new().ptr(y.ptr()).ptr(early.ptr()).len(n))?;
            gpu.copy(kept.ptr(), y.ptr(), n * 4)?;
        }
        if y.download(&mut [0f32; 4]).is_ok() {
            return Err(wrong("a read while capturing was let through"));
        }
        Ok::<_, Error>(kept)
    })?;
    // Whoever allocates now must not land in the graph's memory.
    let others: Vec<_> = (0..50).map(|_| gpu.upload(&vec![-5f32; n])).collect::<Result<_>>()?;
    graph.launch()?;
    graph.launch()?;
    let mut host = vec![0f32; n];
    for (i, buffer) in others.iter().enumerate() {
        buffer.download(&mut host)?;
        if host.iter().any(|&x| x != -5.0) {
            return Err(wrong(format!("the graph wrote into buffer {i} of somebody else")));
        }
    }
    // One launch adds (0 + 1 + 2 + 3)·3 + 4·(i mod 7) + 100.
    let want = |i: usize| 2.0 * (118.0 + 4.0 * (i % 7) as f32);
    for buffer in [&y, &kept] {
        buffer.download(&mut host)?;
        if let Some(i) = (0..n).find(|&i| host[i] != want(i)) {
            return Err(wrong(format!("{} instead of {} at {i}", host[i], want(i))));
        }
    }
    let nodes = graph.nodes();
    let once = gpu.time(|| graph.launch())?;
    drop((graph, kept));
    gpu.synchronize()?;
    Ok(format!("{nodes} nodes, {:.1} µs a launch", once * 1000.0))
}

fn tensor_map(gpu: &Gpu) -> Result<String> {
    if gpu.arch() < (9, 0) {
        return Ok("not on this device".into());
    }
    let x = gpu.alloc(1 << 20)?;
    TensorMap::tiled(Number::BF16, x.ptr(), &[128, 4096], &[256], &[64, 64], Swizzle::B128)?;
    match TensorMap::tiled(Number::BF16, x.ptr() + 2, &[128, 64], &[256], &[64, 64], Swizzle::B128)
    {
        Err(Error::Value(_)) => Ok("made, and a crooked base refused".into()),
        other => Err(wrong(format!("a crooked base: {other:?}"))),
    }
}

fn cache(folder: &Path) -> Result<String> {
    let run = |folder: &Path| -> Result<(usize, usize, Option<String>)> {
        let gpu = Gpu::open(0)?;
        gpu.use_cache(Some(folder.to_owned()));
        kernels(&gpu)?;
        let (compiled, cached) = gpu.compiled_and_cached();
        Ok((compiled, cached, gpu.cache_warning()))
    };
    let expect = |what: &str, got: (usize, usize, Option<String>), want: (usize, usize, bool)| {
        if (got.0, got.1, got.2.is_some()) == want {
            Ok(())
        } else {
            Err(wrong(format!("{what}: {got:?}")))
        }
    };
    let io = |e: std::io::Error| wrong(e.to_string());
    expect("first", run(folder)?, (1, 0, false))?;
    expect("second", run(folder)?, (0, 1, false))?;
    let entry =
        std::fs::read_dir(folder).map_err(io)?.flatten().next().ok_or(wrong("no entry"))?.path();
    let whole = std::fs::read(&entry).map_err(io)?;
    let mut bad = whole.clone();
    bad[whole.len() / 2] ^= 1;
    for bad in [&bad[..], &whole[..whole.len() / 2], b"", b"not a kernel"] {
        std::fs::write(&entry, bad).map_err(io)?;
        expect("after damage", run(folder)?, (1, 0, false))?;
        expect("after repair", run(folder)?, (0, 1, false))?;
    }
    // Root may write to read-only folders; a file in the way stops anybody.
    let blocked = entry.join("below a file");
    expect("no folder", run(&blocked)?, (1, 0, true))?;
    Ok("written, read, repaired four times, and done without".into())
}

fn memory(gpu: &Gpu) -> Result<String> {
    let (free, _) = gpu.memory()?;
    let mut big = Vec::new();
    for share in [0.3, 0.2, 0.1] {
        let label =
            tercet_cuda::Label::shaped("f32", &[1000, (free as f64 * share / 4000.0) as usize]);
        big.push(gpu.alloc_for((free as f64 * share) as usize, label)?);
    }
    let used = gpu.memory_use()?;
    let text = match gpu.alloc(free as usize) {
        Err(e @ Error::OutOfMemory(_)) => e.to_string(),
        Err(e) => return Err(e),
        Ok(_) => return Err(wrong("more than everything was given")),
    };
    drop(big);
    // After an error and the frees, all of it can be had again, in one piece.
    drop(gpu.alloc((free as f64 * 0.9) as usize)?);
    gpu.synchronize()?;
    let kept = gpu.memory_use()?;
    gpu.trim()?;
    Ok(format!(
        "{text}\n      while full {used:?}, after {kept:?}, trimmed {:?}",
        gpu.memory_use()?
    ))
}

fn main() {
    for library in Library::ALL {
        println!("{}: {:?}", library.name(), look_for(library));
    }
    let mut report = Report { failures: 0 };
    match probe() {
        Ok(devices) => devices.iter().for_each(|d| println!("{d:?}")),
        Err(e) => {
            println!("no device: {e}");
            std::process::exit(2);
        }
    }
    match Gpu::open(99) {
        Err(e) => println!("ok    a device that is not there: {e}"),
        Ok(_) => report.line("a device that is not there", Err(wrong("was opened"))),
    }
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(e) => {
            println!("FAIL  open: {e}");
            std::process::exit(1);
        }
    };
    report.line("kernels", kernels(&gpu));
    report.line("matmul", matmuls(&gpu));
    report.line("f32 matmul", f32_is_not_tf32(&gpu));
    report.line("rates", rates(&gpu));
    report.line("graphs", graphs(&gpu));
    report.line("tensor map", tensor_map(&gpu));
    let folder = std::env::temp_dir().join(format!("smoke-cache-{}", std::process::id()));
    report.line("cache", cache(&folder));
    let _ = std::fs::remove_dir_all(&folder);
    report.line("memory", memory(&gpu));
    println!("{} failures", report.failures);
    std::process::exit(i32::from(report.failures > 0));
}
