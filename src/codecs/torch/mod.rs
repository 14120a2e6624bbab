//! Files of PyTorch (`pytorch_model.bin`, `.pt`, `.pth`): an archive with a pickle that describes tensors, and a member
//! for each storage that they are views of. The pickle is read as data; nothing in it is executed.

mod pickle;
mod zip;

use super::cast::Dtype;
pub use pickle::Refusal;
use pickle::View;

/// The names that transformers gives to such files.
pub const SINGLE_FILE: &str = "pytorch_model.bin";
/// The index of shards.
pub const INDEX_FILE: &str = "pytorch_model.bin.index.json";

/// The first bytes of a file of PyTorch before 1.6, which is several pickles one after the other.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
/// The pickle in the archive, and what is in front of the names of storages.
const TABLE: &str = "data.pkl";
const DATA: &str = "data/";
const BYTE_ORDER: &str = "byteorder";

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// The shape.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub begin: usize,
    /// One past the last byte in the file that it needs.
    pub end: usize,
    /// Elements from one to the next, in each dimension; `None` if they are in row-major order without holes.
    pub strides: Option<Vec<usize>>,
}

/// Whether a file is in the current form of PyTorch, as far as its first bytes show.
pub fn is_begun(file: &[u8]) -> bool {
    file.starts_with(zip::MAGIC)
}

/// Whether a file is in the form that PyTorch wrote before 1.6.
pub fn is_legacy(file: &[u8]) -> bool {
    file.starts_with(LEGACY)
}

/// The tensors of a file, in the order of its pickle.
///
/// # Errors
/// The file is damaged, is not a checkpoint, or its pickle asks for something that is not a tensor.
pub fn read(file: &[u8]) -> Result<Vec<Entry>, Refusal> {
    let members = zip::members(file).map_err(Refusal::Broken)?;
    let mut tables = members.iter().filter_map(|(name, range)| Some((name.strip_suffix(TABLE)?, range)));
    let (prefix, table) = tables
        .find(|(prefix, _)| prefix.matches('/').count() <= 1)
        .ok_or("it has no `data.pkl`, and is another archive")?;
    let order = members.get(&format!("{prefix}{BYTE_ORDER}")).map_or(&b"little"[..], |range| &file[range.clone()]);
    if order.trim_ascii() != b"little" {
        return Err("its numbers are not little-endian".into());
    }
    let entry = |(name, view): (String, View)| {
        let key = format!("{prefix}{DATA}{}", view.key);
        let storage = members.get(&key).ok_or_else(|| format!("the data of tensor `{name}`, `{key}`, are absent"));
        let placed = storage.and_then(|storage| {
            let damaged = || format!("tensor `{name}` of shape {:?} is not inside of `{key}`", view.shape);
            place(&view, storage.start, storage.len()).ok_or_else(damaged)
        });
        let (begin, end) = placed.map_err(Refusal::Broken)?;
        let strides = strides_of(&view);
        Ok(Entry { name, dtype: view.dtype, shape: view.shape, begin, end, strides })
    };
    pickle::tensors(&file[table.clone()])?.into_iter().map(entry).collect()
}

/// The bytes of the file that a view of a storage needs; `None` if it leaves its storage, or repeats elements and so
/// claims more than is stored.
fn place(view: &View, begin: usize, n_bytes: usize) -> Option<(usize, usize)> {
    let size = view.dtype.bitsize().div_ceil(8).max(1);
    let n_stored = n_bytes / size;
    let n_elements = view.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    let reach = view
        .shape
        .iter()
        .zip(&view.strides)
        .try_fold(0usize, |reach, (&d, &stride)| reach.checked_add(d.saturating_sub(1).checked_mul(stride)?))?;
    let last = if n_elements == 0 { view.offset } else { view.offset.checked_add(reach)?.checked_add(1)? };
    let fits = last <= n_stored && n_elements <= n_stored;
    fits.then(|| (begin + view.offset * size, begin + last * size))
}

/// The strides of a view that is not in row-major order. Strides of single elements mean
/// nothing, and may be any number.
fn strides_of(view: &View) -> Option<Vec<usize>> {
    let mut expected = 1usize;
    let is_in_order = view.shape.iter().zip(&view.strides).rev().all(|(&d, &stride)| {
        let fits = d <= 1 || stride == expected;
        expected = expected.saturating_mul(d.max(1));
        fits
    });
    let of = |(&d, &stride): (&usize, &usize)| if d <= 1 { 0 } else { stride };
    (!is_in_order && !view.shape.contains(&0)).then(|| view.shape.iter().zip(&view.strides).map(of).collect())
}

/// The elements of a view in row-major order. `bytes` begin with its first element.
pub fn gather(bytes: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let n_elements: usize = shape.iter().product();
    let mut gathered = Vec::with_capacity(n_elements * size);
    let mut place = vec![0; shape.len()];
    let mut at = 0;
    for _ in 0..n_elements {
        gathered.extend(&bytes[at * size..(at + 1) * size]);
        for (dimension, index) in place.iter_mut().enumerate().rev() {
            *index += 1;
            at += strides[dimension];
            if *index < shape[dimension] {
                break;
            }
            at -= *index * strides[dimension];
            *index = 0;
        }
    }
    gathered
}

#[cfg(test)]
mod tests;
