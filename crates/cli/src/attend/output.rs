//! What `attend` writes: a safetensors file that appears whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use tempfile::NamedTempFile;
use tercet_attention::{Element, NsaSpec};

/// A result.
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub data: Data,
}

/// A result's elements.
pub enum Data {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    I32(Vec<i32>),
}

/// An element type that results can be written in.
pub trait Stored: Element {
    fn data(values: Vec<Self>) -> Data;
}

impl Stored for f32 {
    fn data(values: Vec<Self>) -> Data {
        Data::F32(values)
    }
}

impl Stored for bf16 {
    fn data(values: Vec<Self>) -> Data {
        Data::Bf16(values)
    }
}

impl Data {
    fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::Bf16(_) => Dtype::BF16,
            Self::I32(_) => Dtype::I32,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(x) => x.len() * 4,
            Self::Bf16(x) => x.len() * 2,
            Self::I32(x) => x.len() * 4,
        }
    }

    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::F32(x) => x.iter().try_for_each(|x| to.write_all(&x.to_le_bytes())),
            Self::Bf16(x) => x.iter().try_for_each(|x| to.write_all(&x.to_le_bytes())),
            Self::I32(x) => x.iter().try_for_each(|x| to.write_all(&x.to_le_bytes())),
        }
    }
}

/// A file in the making, beside the place where it will appear.
pub struct Output {
    path: PathBuf,
    folder: PathBuf,
    temporary: NamedTempFile,
}

impl Output {
    /// Makes the file in the folder of `path`; on any failure later it is removed.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let cannot = || format!("cannot write {}", path.display());
        if path.is_dir() {
            let error = io::Error::from(io::ErrorKind::IsADirectory);
            return Err(error).with_context(cannot);
        }
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        {
            // As readable as any other new file: the umask takes its share of this.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let temporary = builder.tempfile_in(folder).with_context(cannot)?;
        Ok(Self { path: path.to_owned(), folder: folder.to_owned(), temporary })
    }

    /// Writes the results and the spec, syncs, and puts the file in its place.
    pub fn write(self, spec: &NsaSpec, tensors: &[Tensor]) -> anyhow::Result<()> {
        let header = header(spec, tensors)?;
        let cannot = || format!("cannot write {}", self.path.display());
        write_all(self.temporary.as_file(), &header, tensors).with_context(cannot)?;
        self.temporary.persist(&self.path).map_err(|e| e.error).with_context(cannot)?;
        // The name is on the disk only when its folder is. Not every file system can say so.
        if let Ok(folder) = File::open(&self.folder) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

fn write_all(file: &File, header: &[u8], tensors: &[Tensor]) -> io::Result<()> {
    let mut to = BufWriter::with_capacity(1 << 20, file);
    to.write_all(&(header.len() as u64).to_le_bytes())?;
    to.write_all(header)?;
    for tensor in tensors {
        tensor.data.write(&mut to)?;
    }
    to.flush()?;
    file.sync_all()
}

/// The JSON header, padded so that the tensors start at a multiple of 8 bytes.
fn header(spec: &NsaSpec, tensors: &[Tensor]) -> anyhow::Result<Vec<u8>> {
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.data.bytes();
        let info = TensorInfo {
            dtype: tensor.data.dtype(),
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        (tensor.name.clone(), info)
    });
    let spec = [("spec".to_owned(), serde_json::to_string(spec)?)].into();
    let metadata = Metadata::new(Some(spec), infos.collect())?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}
