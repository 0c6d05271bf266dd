//! What compiled kernels use, read from the machine code itself: no device and no tool needed.
//!
//! A cubin is a 64-bit ELF file. `.nv.info` holds attributes of all functions (registers, stack
//! frame), `.nv.shared.KERNEL` the static shared memory; an entry has a section `.nv.info.KERNEL`.
//! A stack frame is memory that did not fit into registers: spills, and arrays indexed at run time.

use std::collections::BTreeMap;

use crate::{Error, Result, Source, compile_for};

/// One way to compile a source, as a launch would.
#[derive(Clone, Debug)]
pub struct Build {
    /// The source.
    pub source: Source,
    /// The oldest compute capability it is for.
    pub oldest: (u32, u32),
    /// Its constants.
    pub defines: Vec<(&'static str, String)>,
    /// Dynamic shared memory of its largest launch, bytes.
    pub shared: u32,
}

impl Build {
    /// A build for every device.
    pub fn new(source: Source, defines: Vec<(&'static str, String)>) -> Self {
        Build { source, oldest: (8, 0), defines, shared: 0 }
    }

    /// The source's name and constants in one word, such as `attend DIM=128 GROUP=16`.
    pub fn name(&self) -> String {
        let defines = self.defines.iter().map(|(name, value)| format!(" {name}={value}"));
        format!("{}{}", self.source.name, defines.collect::<String>())
    }

    /// Compiles it for a compute capability and reads what its kernels use.
    pub fn resources(&self, arch: (u32, u32)) -> Result<Vec<Resources>> {
        let mut all = resources(&compile_for(&self.source, arch, &self.defines)?)?;
        all.iter_mut().for_each(|kernel| kernel.shared += self.shared);
        Ok(all)
    }
}

/// What one kernel uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The entry's name.
    pub entry: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread's stack: what was spilled, and arrays that no register can hold.
    pub stack: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
}

/// Attribute codes of `.nv.info`, and the format of those with a length.
const REGISTERS: u8 = 0x2f;
const FRAME: u8 = 0x11;
const SIZED: u8 = 0x04;

/// Reads a cubin; entries come in alphabetical order.
pub fn resources(cubin: &[u8]) -> Result<Vec<Resources>> {
    read(cubin).ok_or_else(|| Error::Value("the compiler's machine code is no cubin".into()))
}

/// A section of an ELF file.
struct Section<'a> {
    name: String,
    kind: u32,
    data: &'a [u8],
    size: u64,
}

fn read(cubin: &[u8]) -> Option<Vec<Resources>> {
    let sections = sections(cubin)?;
    let names = symbols(&sections)?;
    let mut kernels: BTreeMap<String, Resources> = BTreeMap::new();
    for section in &sections {
        if let Some(entry) = section.name.strip_prefix(".nv.info.") {
            let entry = entry.to_owned();
            let empty = Resources { entry: entry.clone(), registers: 0, stack: 0, shared: 0 };
            kernels.insert(entry, empty);
        }
    }
    for section in &sections {
        if let Some(kernel) =
            section.name.strip_prefix(".nv.shared.").and_then(|entry| kernels.get_mut(entry))
        {
            kernel.shared = section.size as u32;
        }
    }
    let info = sections.iter().find(|section| section.name == ".nv.info")?;
    let mut rest = info.data;
    while let [format, attribute, tail @ ..] = rest {
        // Only those with a length have one; all others hold two bytes.
        let size = u16::from_le_bytes([*tail.first()?, *tail.get(1)?]) as usize;
        let size = if *format == SIZED { size } else { 0 };
        let payload = tail.get(2..2 + size)?;
        rest = tail.get(2 + size..)?;
        if *format == SIZED && size >= 8 && matches!(*attribute, REGISTERS | FRAME) {
            let (symbol, value) = (word(payload, 0)?, word(payload, 4)?);
            let kernel = names.get(symbol as usize).and_then(|name| kernels.get_mut(name));
            match (kernel, *attribute) {
                (Some(kernel), REGISTERS) => kernel.registers = value,
                (Some(kernel), _) => kernel.stack = value,
                (None, _) => {}
            }
        }
    }
    Some(kernels.into_values().collect())
}

fn sections(file: &[u8]) -> Option<Vec<Section<'_>>> {
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size) = (long(file, 0x28)? as usize, half(file, 0x3a)? as usize);
    let (count, names) = (half(file, 0x3c)? as usize, half(file, 0x3e)? as usize);
    let header = |i: usize| file.get(table.checked_add(i * size)?..)?.get(..0x40);
    let extent = |header: &[u8]| Some((long(header, 0x18)? as usize, long(header, 0x20)?));
    let (start, _) = extent(header(names)?)?;
    let strings = file.get(start..)?;
    let mut all = Vec::new();
    for i in 0..count {
        let header = header(i)?;
        let (start, size) = extent(header)?;
        let kind = word(header, 4)?;
        // Shared memory takes a size but no bytes of the file (SHT_NOBITS).
        let data =
            if kind == 8 { &[] } else { file.get(start..start.checked_add(size as usize)?)? };
        all.push(Section { name: text(strings, word(header, 0)? as usize)?, kind, data, size });
    }
    Some(all)
}

/// Names of the symbols by index.
fn symbols(sections: &[Section]) -> Option<Vec<String>> {
    let table = sections.iter().find(|section| section.kind == 2)?;
    let strings = sections.iter().find(|section| section.name == ".strtab")?;
    table
        .data
        .chunks_exact(24)
        .map(|symbol| text(strings.data, word(symbol, 0)? as usize))
        .collect()
}

fn text(strings: &[u8], at: usize) -> Option<String> {
    let bytes = strings.get(at..)?.split(|&b| b == 0).next()?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Library, look_for};

    #[test]
    fn what_is_no_cubin_is_an_error() {
        for bytes in [&b""[..], b"\x7fELF\x02\x01", &[0; 4096], b"\x7fELF\x02\x01\xff\xff\xff\xff"]
        {
            assert!(resources(bytes).is_err());
        }
        let mut long = b"\x7fELF\x02\x01".to_vec();
        long.resize(4096, 0xff);
        assert!(resources(&long).is_err());
    }

    #[test]
    fn registers_shared_memory_and_stack_are_read_from_the_code() {
        if look_for(Library::Nvrtc).is_err() {
            println!("skipped: there is no NVRTC here");
            return;
        }
        const TEXT: &str = r#"
            extern "C" __global__ void plain(float* x) { x[threadIdx.x] *= 2.0f; }
            extern "C" __global__ void shared(float* x) {
                __shared__ float s[256];
                s[threadIdx.x] = x[threadIdx.x];
                __syncthreads();
                x[threadIdx.x] = s[255 - threadIdx.x];
            }
            extern "C" __global__ void stack(float* x, int n) {
                float a[64];
                for (int i = 0; i < 64; i++) a[i] = x[i * n];
                for (int i = 0; i < n; i++) a[(int)x[i] & 63] += 1.0f;
                for (int i = 0; i < 64; i++) x[i] = a[i];
            }"#;
        let build = Build::new(Source::new("test", TEXT), Vec::new());
        for arch in [(8, 0), (9, 0)] {
            let all = build.resources(arch).unwrap();
            let names: Vec<&str> = all.iter().map(|kernel| &*kernel.entry).collect();
            assert_eq!(names, ["plain", "shared", "stack"]);
            assert!(all.iter().all(|kernel| (4..=255).contains(&kernel.registers)), "{all:?}");
            // sm_90 keeps a kilobyte for itself where there is any.
            let reserved = if arch == (9, 0) { 1024 } else { 0 };
            assert_eq!(all[1].shared, 1024 + reserved, "{all:?}");
            assert_eq!((all[0].stack, all[1].stack), (0, 0));
            assert!(all[2].stack >= 256, "{all:?}");
        }
    }
}
