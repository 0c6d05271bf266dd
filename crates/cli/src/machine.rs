//! What this machine is: CPU, threads, memory, devices. Only looks; starts and changes nothing.

use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

/// The processor and memory.
pub struct Machine {
    /// The processor's own name.
    pub cpu: String,
    /// Logical cores.
    pub cores: usize,
    /// Bytes of memory in all.
    pub memory_total: u64,
    /// Bytes of memory that can still be had.
    pub memory_available: u64,
}

impl Machine {
    /// Asks the operating system.
    pub fn detect() -> Self {
        let wanted = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let Ok(system) = System::new_with_specifics(wanted) else {
            let cpu = "unknown".into();
            return Self { cpu, cores, memory_total: 0, memory_available: 0 };
        };
        let brand = system.cpus().first().map(|c| c.brand().trim().to_owned());
        Self {
            cpu: brand.filter(|b| !b.is_empty()).unwrap_or_else(|| "unknown".into()),
            cores,
            memory_total: system.total_memory(),
            memory_available: system.available_memory(),
        }
    }
}

/// SIMD features that matter here, and whether this processor has them.
pub fn simd_features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    return vec![
        ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
        ("FMA", std::arch::is_x86_feature_detected!("fma")),
        ("F16C", std::arch::is_x86_feature_detected!("f16c")),
        ("AVX-512F", std::arch::is_x86_feature_detected!("avx512f")),
        ("AVX-512BW", std::arch::is_x86_feature_detected!("avx512bw")),
        ("AVX-512-BF16", std::arch::is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(target_arch = "aarch64")]
    return vec![("NEON", std::arch::is_aarch64_feature_detected!("neon"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return Vec::new();
}

/// Forgets the process's peak of resident memory, so that [`peak_memory`] speaks of what comes
/// next. False where the system cannot (only Linux can).
pub fn reset_peak_memory() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Peak resident memory (VmHWM) in bytes since the start or the last reset; only on Linux.
pub fn peak_memory() -> Option<u64> {
    status_field("VmHWM:")
}

fn status_field(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn peak_memory_sees_an_allocation_and_forgets_it_on_reset() {
        if !reset_peak_memory() {
            println!("skipped: /proc/self/clear_refs is not writable here");
            return;
        }
        let before = peak_memory().unwrap();
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        let during = peak_memory().unwrap();
        assert!(during >= before + (60 << 20), "{before} -> {during}");
        drop(block);
        reset_peak_memory();
        assert!(peak_memory().unwrap() < during);
    }
}
