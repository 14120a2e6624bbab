//! The archive around a checkpoint of PyTorch: a zip file whose members are stored as they are, so that
//! each is a range of the file.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive};

/// The first bytes of such a file.
pub const MAGIC: &[u8] = b"PK\x03\x04";

/// The members by name, each with its range of the file.
///
/// # Errors
/// The directory is damaged, or a member is compressed.
pub fn members(file: &[u8]) -> Result<BTreeMap<String, Range<usize>>, String> {
    let damaged = |error| format!("the file is cut off, or the directory of its archive is damaged: {error}");
    let mut archive = ZipArchive::new(Cursor::new(file)).map_err(damaged)?;
    let mut members = BTreeMap::new();
    for at in 0..archive.len() {
        let member = archive.by_index_raw(at).map_err(damaged)?;
        let name = member.name().map_err(damaged)?.into_owned();
        if member.compression() != CompressionMethod::Stored {
            return Err(format!("its member `{name}` is compressed, which PyTorch does not do"));
        }
        let range = member.data_start().and_then(|begin| {
            let end = begin.checked_add(member.size()).filter(|&end| end <= file.len() as u64)?;
            Some(begin as usize..end as usize)
        });
        let range = range.ok_or_else(|| format!("member `{name}`: it is cut off"))?;
        members.insert(name, range);
    }
    Ok(members)
}
