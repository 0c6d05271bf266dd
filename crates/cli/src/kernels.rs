//! `tercet kernels`: compiles every CUDA kernel without a GPU and watches what it uses.
//!
//! `lab/kernels.toml` lists the sources, the constants of real launches, and for each compute
//! capability what every kernel used when the list was last written. A kernel that spills more
//! than it did fails the check.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tercet_cuda::{Library, Resources, Source, compile_for, look_for, resources};
use tercet_train::files;

use crate::error::user;

/// Compile every CUDA kernel of a list, without a GPU; fail on a new spill.
///
/// Needs NVRTC (`pip install nvidia-cuda-nvrtc`, with its folder in LD_LIBRARY_PATH).
#[derive(clap::Args)]
pub struct Args {
    /// The list
    #[arg(default_value = "lab/kernels.toml")]
    list: PathBuf,
    /// Write what the kernels use now into the list
    #[arg(long)]
    write: bool,
    /// Only sources whose path holds this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// The list.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    /// Sources of the repository that are no kernels of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    except: Vec<String>,
    build: Vec<Build>,
}

/// One source with one set of constants.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Build {
    /// Path in the repository; the list lies one folder below its root.
    source: String,
    /// Compute capabilities it is for, such as 80 and 90.
    archs: Vec<u32>,
    /// `NAME=VALUE`, as a launch gives them.
    #[serde(default)]
    defines: Vec<String>,
    /// The kernels that are launched; all that the source holds when there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    entries: Vec<String>,
    /// By compute capability and entry: registers of a thread, bytes of its stack (what was
    /// spilled, and arrays that no register holds), bytes of static shared memory of a block.
    #[serde(default)]
    uses: BTreeMap<String, BTreeMap<String, [u32; 3]>>,
}

/// Compiles and compares, or writes.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let nvrtc = look_for(Library::Nvrtc)?;
    let text = std::fs::read_to_string(&args.list)
        .with_context(|| format!("cannot read {}", args.list.display()))?;
    let mut list: List =
        toml::from_str(&text).map_err(|e| user(format!("{}: {e}", args.list.display())))?;
    let root = args.list.parent().and_then(Path::parent).unwrap_or(Path::new(""));
    println!("compiling {} builds with {nvrtc}", list.build.len());
    let mut problems = unlisted(root, &list)?;
    let (mut kernels, mut spilling) = (0, 0);
    for build in &mut list.build {
        if args.only.as_ref().is_some_and(|only| !build.source.contains(only)) {
            continue;
        }
        for arch in build.archs.clone() {
            let name = format!("{} {} sm_{arch}", build.source, build.defines.join(" "));
            let launched = |kernel: &Resources| {
                build.entries.is_empty() || build.entries.contains(&kernel.entry)
            };
            let all: Vec<Resources> = match compile(root, build, arch) {
                Ok(all) => all.into_iter().filter(launched).collect(),
                Err(error) => {
                    problems.push(format!("{name}: {error:#}"));
                    continue;
                }
            };
            kernels += all.len();
            spilling += all.iter().filter(|kernel| kernel.stack > 0).count();
            let recorded = build.uses.entry(format!("sm_{arch}")).or_default();
            for kernel in &all {
                match recorded.get(&kernel.entry) {
                    Some(&before) => problems.extend(worse(&name, kernel, before, args.write)),
                    None if kernel.stack > 0 && !args.write => problems.push(format!(
                        "{name}: {} is new and uses {} bytes of stack",
                        kernel.entry, kernel.stack
                    )),
                    None => {}
                }
            }
            if args.write {
                let uses = |k: Resources| (k.entry, [k.registers, k.stack, k.shared]);
                *recorded = all.into_iter().map(uses).collect();
            }
        }
    }
    println!("{kernels} kernels, {spilling} of them with a stack");
    if args.write {
        let text = format!("{HEADER}{}", toml::to_string(&list)?);
        files::write_atomic(&args.list, text.as_bytes())?;
        println!("wrote {}", args.list.display());
    }
    if problems.is_empty() {
        return Ok(());
    }
    let count = problems.len();
    Err(anyhow::anyhow!("{count} kernels or sources need a look:\n{}", problems.join("\n")))
}

const HEADER: &str = "\
# CUDA kernels, the constants of their launches, and what they use: [registers, stack, static shared memory].
# Checked by `tercet kernels` (see .ci/run), which fails on a kernel that spills more than it did; `--write` records
# what is so now. Compiled by NVRTC 13.0.

";

/// A line when a kernel spills more than it did; a printed one when only its registers changed.
fn worse(name: &str, now: &Resources, before: [u32; 3], written: bool) -> Option<String> {
    let [registers, stack, shared] = before;
    let text = format!(
        "{name}: {} uses {} registers, {} bytes of stack, {} of shared memory (before: {registers}, \
         {stack}, {shared})",
        now.entry, now.registers, now.stack, now.shared
    );
    if now.stack > stack && !written {
        return Some(text);
    }
    if (now.registers, now.stack, now.shared) != (registers, stack, shared) {
        println!("changed: {text}");
    }
    None
}

/// Compiles a build with all headers that lie where its source includes them from.
fn compile(root: &Path, build: &Build, arch: u32) -> anyhow::Result<Vec<Resources>> {
    let path = root.join(&build.source);
    let text = read(&path)?;
    let mut headers = Vec::new();
    gather(&path, &text, &mut headers)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    // The compiler's room takes texts that live as long as the program, as embedded ones do; this
    // verb ends when it has compiled each once.
    let keep = |text: String| -> &'static str { Box::leak(text.into_boxed_str()) };
    let headers: Vec<(&'static str, &'static str)> =
        headers.into_iter().map(|(name, text)| (keep(name), keep(text))).collect();
    let source = Source { name: keep(name), text: keep(text), headers: Box::leak(headers.into()) };
    let defines: Vec<(&str, String)> = build
        .defines
        .iter()
        .map(|define| {
            let (name, value) = define.split_once('=').unwrap_or((define, "1"));
            (name, value.to_owned())
        })
        .collect();
    let cubin = compile_for(&source, (arch / 10, arch % 10), &defines)?;
    Ok(resources(&cubin)?)
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Headers that a text includes and theirs; those that every kernel gets are left to the
/// compiler's room.
fn gather(source: &Path, text: &str, all: &mut Vec<(String, String)>) -> anyhow::Result<()> {
    for line in text.lines() {
        let Some(rest) = line.trim_start().strip_prefix("#include \"") else { continue };
        let name = rest.split('"').next().unwrap_or_default().to_owned();
        let known = tercet_cuda::HEADERS.iter().any(|(header, _)| *header == name);
        if known || all.iter().any(|(held, _)| *held == name) {
            continue;
        }
        // Beside the source, or in a folder beside its own.
        let here = source.parent().unwrap_or(Path::new(""));
        let mut folders = vec![here.to_owned()];
        if let Some(above) = here.parent() {
            folders.push(above.to_owned());
            let others = std::fs::read_dir(above).into_iter().flatten().flatten();
            folders.extend(others.map(|entry| entry.path()).filter(|path| path.is_dir()));
        }
        let found = folders.iter().map(|folder| folder.join(&name)).find(|path| path.exists());
        let path = found.ok_or_else(|| user(format!("{name} is included, but not there")))?;
        let text = read(&path)?;
        all.push((name, text.clone()));
        gather(&path, &text, all)?;
    }
    Ok(())
}

/// CUDA sources of the crates that the list does not know.
fn unlisted(root: &Path, list: &List) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![root.join("crates")];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder)
            .with_context(|| format!("cannot read {}", folder.display()))?;
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "cu") {
                let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
                let known = list.build.iter().any(|build| build.source == name)
                    || list.except.contains(&name);
                if !known {
                    found.push(format!("{name} is not in the list: add a [[build]]"));
                }
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_spills_more_is_named_and_one_that_spills_less_is_not() {
        let now = |stack| Resources { entry: "k".into(), registers: 40, stack, shared: 0 };
        assert!(worse("x", &now(8), [40, 0, 0], false).unwrap().contains("k uses 40 registers, 8"));
        assert!(worse("x", &now(8), [40, 16, 0], false).is_none());
        assert!(worse("x", &now(8), [40, 0, 0], true).is_none());
    }

    #[test]
    fn headers_are_found_through_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
        write("a.cuh", "#include \"b.cuh\"\n#include \"types.cuh\"\n").unwrap();
        write("b.cuh", "#include \"a.cuh\"\n").unwrap();
        let (mut all, source) = (Vec::new(), folder.path().join("x.cu"));
        gather(&source, "  #include \"a.cuh\"\n", &mut all).unwrap();
        let names: Vec<&str> = all.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["a.cuh", "b.cuh"]);
        assert!(gather(&source, "#include \"c.cuh\"\n", &mut all).is_err());
    }
}
