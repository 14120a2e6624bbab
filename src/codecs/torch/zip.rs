//! The archive around a checkpoint of PyTorch: a zip file whose members are stored as they are, so that each is a range of the file.

use std::collections::BTreeMap;
use std::ops::Range;

/// The first bytes of such a file.
pub const MAGIC: &[u8] = b"PK\x03\x04";

const END: &[u8] = b"PK\x05\x06";
const END_BYTES: usize = 22;
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const LOCATOR_BYTES: usize = 20;
const MEMBER: &[u8] = b"PK\x01\x02";
const MEMBER_BYTES: usize = 46;
const LOCAL_BYTES: usize = 30;
/// The longest comment that may follow the end record.
const COMMENT: usize = u16::MAX as usize;

/// A number of `N` bytes at `at`.
fn number<const N: usize>(file: &[u8], at: usize) -> Result<u64, String> {
    let bytes = at.checked_add(N).and_then(|end| file.get(at..end)).ok_or("its directory is cut off")?;
    let mut whole = [0; 8];
    whole[..N].copy_from_slice(bytes);
    Ok(u64::from_le_bytes(whole))
}

fn place<const N: usize>(file: &[u8], at: usize) -> Result<usize, String> {
    usize::try_from(number::<N>(file, at)?).map_err(|_| "its directory is cut off".into())
}

/// The members by name, each with its range of the file.
///
/// # Errors
/// The directory is damaged, or a member is compressed.
pub fn members(file: &[u8]) -> Result<BTreeMap<String, Range<usize>>, String> {
    let Range { start: mut at, end } = directory(file)?;
    let mut members = BTreeMap::new();
    while at < end && file.get(at..).is_some_and(|rest| rest.starts_with(MEMBER)) {
        let [name, extra, comment] =
            [place::<2>(file, at + 28)?, place::<2>(file, at + 30)?, place::<2>(file, at + 32)?];
        let begin = at + MEMBER_BYTES;
        let text = file.get(begin..begin + name).ok_or("its directory is cut off")?;
        let text = std::str::from_utf8(text).map_err(|_| "a name in its directory is not UTF-8".to_string())?;
        if number::<2>(file, at + 10)? != 0 {
            return Err(format!("its member `{text}` is compressed, which PyTorch does not do"));
        }
        let range = range_of(file, at, begin + name, extra).map_err(|reason| format!("member `{text}`: {reason}"))?;
        members.insert(text.to_string(), range);
        at = begin + name + extra + comment;
    }
    Ok(members)
}

/// The range of the directory.
fn directory(file: &[u8]) -> Result<Range<usize>, String> {
    let last = file.len().checked_sub(END_BYTES).ok_or("it is too short for an archive")?;
    let first = last.saturating_sub(COMMENT);
    let end = (first..=last).rev().find(|&at| file[at..].starts_with(END));
    let end = end.ok_or("the end of the archive is missing: the file is cut off")?;
    let (mut size, mut begin) = (place::<4>(file, end + 12)?, place::<4>(file, end + 16)?);
    let locator = end.checked_sub(LOCATOR_BYTES).filter(|&at| file[at..].starts_with(LOCATOR_64));
    if let Some(locator) = locator {
        let large = place::<8>(file, locator + 8)?;
        if !file.get(large..).is_some_and(|rest| rest.starts_with(END_64)) {
            return Err("its directory is not where it says".into());
        }
        (size, begin) = (place::<8>(file, large.saturating_add(40))?, place::<8>(file, large.saturating_add(48))?);
    }
    let range = begin.checked_add(size).filter(|&stop| stop <= file.len()).map(|stop| begin..stop);
    range.ok_or_else(|| "its directory is cut off".into())
}

/// The range of the member whose entry is at `at`, and the entry's extra fields at `extra_at`.
fn range_of(file: &[u8], at: usize, extra_at: usize, extra_bytes: usize) -> Result<Range<usize>, String> {
    let mut size = place::<4>(file, at + 24)?;
    let mut packed = place::<4>(file, at + 20)?;
    let mut local = place::<4>(file, at + 42)?;
    // Numbers that do not fit are in an extra field, in this order, and only these.
    let (mut field, stop) = (extra_at, extra_at + extra_bytes);
    while field + 4 <= stop {
        let (id, width) = (number::<2>(file, field)?, place::<2>(file, field + 2)?);
        let mut value = field + 4;
        for number in [&mut size, &mut packed, &mut local] {
            if id == 1 && *number == u32::MAX as usize && value + 8 <= field + 4 + width {
                *number = place::<8>(file, value)?;
                value += 8;
            }
        }
        field += 4 + width;
    }
    if size != packed {
        return Err("its sizes contradict each other".into());
    }
    if !file.get(local..).is_some_and(|rest| rest.starts_with(MAGIC)) {
        return Err("it is not where the directory says".into());
    }
    let begin = local + LOCAL_BYTES + place::<2>(file, local + 26)? + place::<2>(file, local + 28)?;
    let end = begin.checked_add(size).filter(|&end| end <= file.len());
    end.map(|end| begin..end).ok_or_else(|| "it is cut off".into())
}
