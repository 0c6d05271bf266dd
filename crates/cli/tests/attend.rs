//! `tercet attend` through the binary: golden numbers in and out, and every bad input refused
//! with a sentence, exit code 2 and nothing left behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tempfile::TempDir;

/// A tensor: dtype, shape, bytes.
type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// A safetensors file to be broken.
#[derive(Clone)]
struct File {
    spec: Option<String>,
    tensors: BTreeMap<String, Tensor>,
}

fn f32s(shape: &[usize], f: impl Fn(usize) -> f32) -> Tensor {
    let n = shape.iter().product();
    (Dtype::F32, shape.to_vec(), (0..n).flat_map(|i| f(i).to_le_bytes()).collect())
}

fn i32s(values: &[i32]) -> Tensor {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    (Dtype::I32, vec![values.len()], bytes)
}

impl File {
    /// 40 tokens, 4 query heads, 2 KV heads, D 8, V 6.
    fn new() -> Self {
        let mut tensors = BTreeMap::new();
        let wave = |seed: usize| move |i: usize| ((i * 7 + seed * 13) as f32 * 0.37).sin();
        for (seed, (name, shape)) in [
            ("q", [40, 4, 8]),
            ("k_cmp", [40, 2, 8]),
            ("v_cmp", [40, 2, 6]),
            ("k_slc", [40, 2, 8]),
            ("v_slc", [40, 2, 6]),
            ("k_win", [40, 2, 8]),
            ("v_win", [40, 2, 6]),
            ("gate", [40, 4, 3]),
            ("d_out", [40, 4, 6]),
        ]
        .into_iter()
        .enumerate()
        {
            tensors.insert(name.to_owned(), f32s(&shape, wave(seed)));
        }
        let spec = r#"{"compress_block": 8, "compress_stride": 4, "select_block": 8,
                       "select_count": 4, "window": 6}"#;
        Self { spec: Some(spec.into()), tensors }
    }

    fn with(mut self, name: &str, tensor: Tensor) -> Self {
        self.tensors.insert(name.into(), tensor);
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors.remove(name).unwrap();
        self
    }

    fn spec(mut self, spec: &str) -> Self {
        self.spec = Some(spec.into());
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let metadata = self.spec.as_ref().map(|spec| [("spec".into(), spec.clone())].into());
        safetensors::serialize(views, metadata).unwrap()
    }

    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let spec = header.metadata().as_ref().map(|metadata| metadata["spec"].clone());
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter();
        let own = |(name, view): (String, TensorView)| {
            (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        Self { spec, tensors: tensors.map(own).collect() }
    }

    fn values(&self, name: &str) -> Vec<f64> {
        let (dtype, _, bytes) = &self.tensors[name];
        let wide = |b: &[u8]| match dtype {
            Dtype::F32 => f64::from(f32::from_le_bytes(b.try_into().unwrap())),
            Dtype::BF16 => half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64(),
            Dtype::I32 => f64::from(i32::from_le_bytes(b.try_into().unwrap())),
            other => panic!("{name} is {other:?}"),
        };
        bytes.chunks_exact(dtype.bitsize() / 8).map(wide).collect()
    }
}

/// A folder with an input file.
struct Desk {
    folder: TempDir,
}

impl Desk {
    fn new(input: &[u8]) -> Self {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("in.safetensors"), input).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `attend` from in.safetensors to out.safetensors, in the folder.
    fn attend(&self, more: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_tercet"))
            .current_dir(self.folder.path())
            .args(["attend", "--input", "in.safetensors", "--output", "out.safetensors"])
            .args(more)
            .output()
            .unwrap()
    }

    fn result(&self, more: &[&str]) -> File {
        let output = self.attend(more);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{more:?}: {said}");
        File::read(&self.path("out.safetensors"))
    }
}

/// Asserts that the input is refused in a sentence that holds `words`, leaving nothing behind.
fn refuse(what: &str, input: &[u8], more: &[&str], words: &[&str]) {
    let desk = Desk::new(input);
    let output = desk.attend(more);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{what}: {said}");
    for word in words {
        assert!(said.contains(word), "{what}: no `{word}` in: {said}");
    }
    assert!(!said.contains("bug") && said.lines().count() <= 2, "{what}: {said}");
    assert_eq!(std::fs::read_dir(desk.folder.path()).unwrap().count(), 1, "{what} left a file");
}

/// The golden case that the operator's crate carries.
fn golden() -> (Vec<u8>, File) {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../attention/tests/data");
    let input = std::fs::read(data.join("varlen.input.safetensors")).unwrap();
    (input, File::read(&data.join("varlen.expected.safetensors")))
}

/// The largest error of a tensor, relative to its largest value.
fn relative_error(got: &File, want: &File, name: &str) -> f64 {
    assert_eq!(got.tensors[name].1, want.tensors[name].1, "shape of {name}");
    let (got, want) = (got.values(name), want.values(name));
    let size = want.iter().filter(|x| x.is_finite()).fold(0.0, |m: f64, x| m.max(x.abs()));
    let error = |(g, w): (&f64, &f64)| if g == w { 0.0 } else { (g - w).abs() };
    got.iter().zip(&want).map(error).fold(0.0, f64::max) / size.max(f64::MIN_POSITIVE)
}

#[test]
fn the_golden_case_comes_out_of_the_binary() {
    let (input, expected) = golden();
    let desk = Desk::new(&input);
    // The reference to 1e-6. The fast code is held to its own, tighter rule by the operator's
    // tests; here the bounds only tell right from wrong: some thousand roundings of each dtype.
    for (more, bound, float) in [
        (&["--backward", "--reference"][..], 1e-6, Dtype::F32),
        (&["--backward"], 1e-4, Dtype::F32),
        (&["--backward", "--dtype", "bf16", "--device", "cpu"], 5e-2, Dtype::BF16),
    ] {
        let got = desk.result(more);
        assert_eq!(
            got.tensors.keys().collect::<Vec<_>>(),
            expected.tensors.keys().collect::<Vec<_>>(),
            "{more:?}"
        );
        assert!(got.spec.unwrap().contains(r#""window":40"#), "{more:?}");
        let got = File { spec: None, ..got };
        for name in expected.tensors.keys() {
            let dtype = match &name[..] {
                "indices" => Dtype::I32,
                "lse_cmp" | "lse_slc" | "lse_win" => Dtype::F32,
                _ => float,
            };
            assert_eq!(got.tensors[name].0, dtype, "{more:?}: dtype of {name}");
            let error = relative_error(&got, &expected, name);
            // bf16 inputs may rank near-equal blocks the other way.
            if name != "indices" || float == Dtype::F32 {
                let bound = if name == "indices" { 0.0 } else { bound };
                assert!(error <= bound, "{more:?}: {name} is off by {error:e}");
            }
        }
    }
}

#[test]
fn without_backward_there_are_no_gradients_and_d_out_is_not_needed() {
    let desk = Desk::new(&File::new().without("d_out").bytes());
    for more in [&[][..], &["--reference"]] {
        let got = desk.result(more);
        let names: Vec<&str> = got.tensors.keys().map(String::as_str).collect();
        assert_eq!(names, ["indices", "lse_cmp", "lse_slc", "lse_win", "out"]);
    }
}

#[test]
fn every_compressor_agrees_with_the_reference() {
    let wave = |i: usize| (i as f32 * 0.61).cos() * 0.2;
    let linear = File::new()
        .spec(
            r#"{"compress_block": 8, "compress_stride": 4, "select_block": 8, "select_count": 4,
                "window": 6, "compressor": "linear"}"#,
        )
        .with("phi_k_weight", f32s(&[2, 64, 8], wave))
        .with("phi_k_pe", f32s(&[2, 8, 8], wave))
        .with("phi_v_weight", f32s(&[2, 48, 6], wave))
        .with("phi_v_pe", f32s(&[2, 8, 6], wave));
    let mut mlp = linear.clone();
    mlp.spec = mlp.spec.map(|spec| spec.replace("linear", "mlp"));
    for (letter, c) in [("k", 8), ("v", 6)] {
        mlp = mlp
            .without(&format!("phi_{letter}_weight"))
            .with(&format!("phi_{letter}_weight1"), f32s(&[2, 8 * c, 5], wave))
            .with(&format!("phi_{letter}_bias1"), f32s(&[2, 5], wave))
            .with(&format!("phi_{letter}_weight2"), f32s(&[2, 5, c], wave))
            .with(&format!("phi_{letter}_bias2"), f32s(&[2, c], wave));
    }
    for (file, gradients) in [(File::new(), 8), (linear, 12), (mlp, 18)] {
        let desk = Desk::new(&file.bytes());
        let reference = desk.result(&["--backward", "--reference"]);
        let fast = desk.result(&["--backward"]);
        let count = fast.tensors.keys().filter(|name| name.starts_with("d_")).count();
        assert_eq!(count, gradients, "{:?}", file.spec);
        for name in reference.tensors.keys() {
            // The shift of all keys moves no softmax: these gradients are zero but for rounding.
            let zero =
                name.starts_with("d_phi_k") && (name.ends_with("pe") || name.ends_with("bias2"));
            if !zero {
                let error = relative_error(&fast, &reference, name);
                assert!(error <= 1e-4, "{name} is off by {error:e}; {:?}", file.spec);
            }
        }
    }
}

#[test]
fn without_cu_seqlens_all_tokens_are_one_sequence() {
    let bare = Desk::new(&File::new().bytes()).result(&["--backward"]);
    for offsets in [i32s(&[0, 40]), i32s(&[0, 0, 40, 40])] {
        let told = Desk::new(&File::new().with("cu_seqlens", offsets).bytes());
        let told = told.result(&["--backward"]);
        assert!(bare.tensors == told.tensors);
    }
    let wide = [0i64, 40].iter().flat_map(|x| x.to_le_bytes()).collect();
    let told = Desk::new(&File::new().with("cu_seqlens", (Dtype::I64, vec![2], wide)).bytes());
    assert!(bare.tensors == told.result(&["--backward"]).tensors);
    let two = Desk::new(&File::new().with("cu_seqlens", i32s(&[0, 15, 40])).bytes());
    assert!(bare.tensors != two.result(&["--backward"]).tensors);
}

#[test]
fn no_tokens_at_all() {
    let mut file = File::new();
    for (_, shape, bytes) in file.tensors.values_mut() {
        shape[0] = 0;
        bytes.clear();
    }
    let desk = Desk::new(&file.bytes());
    for more in [&["--backward"][..], &["--backward", "--reference"]] {
        assert_eq!(desk.result(more).tensors["d_q"].1, [0, 4, 8]);
    }
}

#[test]
fn threads_do_not_change_a_byte() {
    let desk = Desk::new(&golden().0);
    let file = |threads| {
        desk.result(&["--backward", "--threads", threads]);
        std::fs::read(desk.path("out.safetensors")).unwrap()
    };
    let one = file("1");
    assert!(one == file("2") && one == file("5"));
}

#[test]
fn the_spec_file_goes_before_the_metadata() {
    let desk = Desk::new(&File::new().bytes());
    std::fs::write(
        desk.path("spec.json"),
        r#"{"compress_block": 8, "compress_stride": 4, "select_block": 8, "select_count": 3,
            "window": 6}"#,
    )
    .unwrap();
    let got = desk.result(&["--spec", "spec.json"]);
    assert_eq!(got.tensors["indices"].1, [40, 2, 3]);
}

#[test]
fn an_old_result_is_replaced_and_stays_when_the_new_one_fails() {
    let desk = Desk::new(&File::new().bytes());
    std::fs::write(desk.path("out.safetensors"), "old").unwrap();
    let output = desk.attend(&["--spec", "missing.json"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(std::fs::read(desk.path("out.safetensors")).unwrap(), b"old");
    desk.result(&[]);
    assert_eq!(std::fs::read_dir(desk.folder.path()).unwrap().count(), 2);
}

#[test]
fn files_that_are_no_safetensors() {
    let good = File::new().bytes();
    refuse("empty", b"", &[], &["in.safetensors", "0 bytes"]);
    refuse("text", b"once upon a time there was a file", &[], &["safetensors", "header"]);
    for cut in [3, 8, 9, 200, good.len() / 2, good.len() - 1] {
        refuse(
            &format!("cut at {cut}"),
            &good[..cut],
            &[],
            &["in.safetensors", "truncated"][..if cut < 8 { 1 } else { 2 }],
        );
    }
    let mut longer = good.clone();
    longer.extend([0; 4]);
    refuse("four bytes more", &longer, &[], &["describes"]);
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refuse("header of 2^64 bytes", &huge, &[], &["header"]);
    let mut garbled = good.clone();
    garbled[8..40].fill(b'x');
    refuse("garbled header", &garbled, &[], &["header"]);
}

#[test]
fn headers_that_lie() {
    let lie = |from: &str, to: &str| {
        let bytes = File::new().bytes();
        let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..8 + size].to_vec()).unwrap();
        assert!(header.contains(from), "{header}");
        let header = header.replacen(from, to, 1);
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(&bytes[8 + size..]);
        file
    };
    let max = u64::MAX.to_string();
    for (from, to) in [
        ("[40,4,8]", "[40,4,9]"),
        ("[40,4,8]", "[18446744073709551615,2,2]"),
        ("[40,4,8]", "[-1,4,8]"),
        (r#""F32""#, r#""F64""#),
        (r#""F32""#, r#""Q9""#),
        (r#""data_offsets":[0,"#, r#""data_offsets":[4,"#),
        (r#""data_offsets":[0,"#, &format!(r#""data_offsets":[{max},"#)),
    ] {
        refuse(&format!("{from} as {to}"), &lie(from, to), &["--backward"], &["in.safetensors"]);
    }
}

#[test]
fn tensors_missing_extra_or_misshapen_are_named() {
    let file = File::new;
    for name in ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"] {
        let what = format!("no {name}");
        refuse(&what, &file().without(name).bytes(), &[], &[name, "missing", "expected ["]);
        let short = file().with(name, f32s(&[39, 2, 5], |_| 0.0)).bytes();
        refuse(&format!("{name} of another shape"), &short, &[], &["shape", "expected ["]);
    }
    let no_d_out = file().without("d_out").bytes();
    refuse("no d_out", &no_d_out, &["--backward"], &["d_out", "missing", "T 40, H 4, V 6"]);
    let extra = file().with("cu_seqlen", i32s(&[0, 40])).bytes();
    refuse("a misspelt name", &extra, &[], &["unexpected", "cu_seqlen", "cu_seqlens"]);
    let phi = file().with("phi_k_weight", f32s(&[2, 64, 8], |_| 0.0)).bytes();
    refuse("parameters of a mean", &phi, &[], &["phi_k_weight", "mean"]);
    let linear = r#"{"compressor": "linear"}"#;
    refuse("a linear without", &file().spec(linear).bytes(), &[], &["phi_k_weight", "missing"]);
    let mlp = r#"{"compressor": "mlp"}"#;
    refuse("an mlp without", &file().spec(mlp).bytes(), &[], &["phi_k_bias1", "missing"]);
    let integers = file().with("q", (Dtype::I32, vec![40, 4, 8], vec![0; 40 * 32 * 4])).bytes();
    refuse("integer queries", &integers, &[], &["q is I32", "F32"]);
    let flat = file().with("q", f32s(&[40, 32], |_| 0.0)).bytes();
    refuse("flat queries", &flat, &[], &["q", "[40, 32]", "[T, H, D]"]);
    let heads = file().with("q", f32s(&[40, 3, 8], |_| 0.0)).bytes();
    refuse("three heads on two", &heads, &[], &["3 query heads", "2 key/value heads"]);
    let wide = file()
        .with("q", f32s(&[40, 4, 300], |_| 0.0))
        .with("k_slc", f32s(&[40, 2, 300], |_| 0.0))
        .bytes();
    refuse("wide heads", &wide, &[], &["300", "256"]);
}

#[test]
fn numbers_that_are_none_are_reported_with_their_place() {
    let spoiled = |name: &str, at: usize, x: f32| {
        let mut file = File::new();
        let bytes = &mut file.tensors.get_mut(name).unwrap().2;
        bytes[at * 4..at * 4 + 4].copy_from_slice(&x.to_le_bytes());
        file.bytes()
    };
    let nan = f32::NAN;
    for more in [&[][..], &["--reference"], &["--dtype", "bf16"]] {
        // Element 77 of [40, 4, 8] is [2, 1, 5].
        refuse("NaN in q", &spoiled("q", 77, nan), more, &["q[2, 1, 5] is NaN"]);
    }
    refuse("NaN in gate", &spoiled("gate", 479, nan), &[], &["gate[39, 3, 2] is NaN"]);
    let infinite = spoiled("v_win", 0, f32::INFINITY);
    refuse("infinity", &infinite, &[], &["v_win[0, 0, 0] is inf"]);
    let d_out = spoiled("d_out", 1, nan);
    refuse("NaN in d_out", &d_out, &["--backward"], &["d_out[0, 0, 1] is NaN"]);
    let large = spoiled("k_cmp", 3, f32::MAX);
    refuse("beyond bf16", &large, &["--dtype", "bf16"], &["k_cmp[0, 0, 3]", "too large"]);
}

#[test]
fn cu_seqlens_that_are_no_offsets() {
    let with = |offsets: &[i32]| File::new().with("cu_seqlens", i32s(offsets)).bytes();
    refuse("empty", &with(&[]), &[], &["cu_seqlens", "empty"]);
    refuse("not from 0", &with(&[1, 40]), &[], &["cu_seqlens", "starts at 1"]);
    refuse("decreasing", &with(&[0, 30, 20, 40]), &[], &["cu_seqlens", "decreases from 30 to 20"]);
    refuse("short", &with(&[0, 39]), &[], &["cu_seqlens", "ends at 39", "40"]);
    refuse("negative", &with(&[0, -40]), &[], &["cu_seqlens", "decreases"]);
    let floats = File::new().with("cu_seqlens", f32s(&[2], |i| i as f32 * 40.0)).bytes();
    refuse("floats", &floats, &[], &["cu_seqlens", "F32", "I32"]);
    let far = [0i64, 1 << 40].iter().flat_map(|x| x.to_le_bytes()).collect();
    let far = File::new().with("cu_seqlens", (Dtype::I64, vec![2], far)).bytes();
    refuse("beyond 32 bits", &far, &[], &["cu_seqlens[1]", "I32"]);
}

#[test]
fn specs_that_are_none() {
    let mut none = File::new();
    none.spec = None;
    refuse("no spec", &none.bytes(), &[], &["no spec", "--spec", "compress_block"]);
    let bad =
        |spec: &str, words: &[&str]| refuse(spec, &File::new().spec(spec).bytes(), &[], words);
    bad("{", &["spec"]);
    bad(r#"{"windwo": 3}"#, &["windwo", "window"]);
    bad(r#"{"window": -3}"#, &["spec", "-3"]);
    bad(r#"{"window": 0}"#, &["window = 0", "at least 1"]);
    bad(r#"{"compress_stride": 7}"#, &["compress_stride = 7", "divide"]);
    bad(r#"{"compressor": "median"}"#, &["median", "mean"]);
    let good = File::new().bytes();
    refuse("no such spec file", &good, &["--spec", "no.json"], &["no.json"]);
    refuse("a folder as spec", &good, &["--spec", "."], &["cannot read"]);
}

#[test]
fn places_that_cannot_be_written_and_arguments_that_make_no_sense() {
    let desk = Desk::new(&File::new().bytes());
    for (output, words) in [
        ("no/such/folder/y.safetensors", "cannot write"),
        (".", "cannot write"),
        ("in.safetensors", "is the input"),
        ("./../in.safetensors/y", "cannot write"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_tercet"))
            .current_dir(desk.folder.path())
            .args(["attend", "--input", "in.safetensors", "--output", output])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(words), "{said}");
    }
    for more in [&["--device", "tpu"][..], &["--dtype", "f8"], &["--sideways"]] {
        assert_eq!(desk.attend(more).status.code(), Some(2), "{more:?}");
    }
    assert_eq!(std::fs::read_dir(desk.folder.path()).unwrap().count(), 1);
    std::fs::remove_file(desk.path("in.safetensors")).unwrap();
    let output = desk.attend(&[]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("cannot read in.safetensors"), "{said}");
}
