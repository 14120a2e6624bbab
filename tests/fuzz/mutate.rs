//! Damages inputs: bytes, JSON by its structure, and both behind a header or a checksum that is corrected afterwards.

use serde_json::{Map, Value, json};

/// SplitMix64: a few lines, and the same numbers forever.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

/// Numbers at which sizes wrap, vanish or outgrow memory.
const NUMBERS: [u64; 18] = [
    0,
    1,
    2,
    3,
    7,
    16,
    31,
    64,
    255,
    65_535,
    1 << 20,
    1_000_000_000,
    1 << 31,
    1 << 32,
    1 << 53,
    1 << 62,
    1 << 63,
    u64::MAX,
];

/// Changes a few places of `bytes`, their length included.
pub fn bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len() + 1);
        match random.below(8) {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 if at < bytes.len() => bytes[at] = random.pick(&[0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'[', b'-', b'9']),
            3 | 4 => {
                // A whole number, often at an aligned or early position, where headers have theirs.
                let at = if random.one_in(2) { at / 4 * 4 } else { at };
                let number = random.pick(&NUMBERS).to_le_bytes();
                let width = random.pick(&[4, 8]);
                for (to, from) in bytes.iter_mut().skip(at).zip(&number[..width]) {
                    *to = *from;
                }
            }
            5 => bytes.truncate(at),
            6 => {
                let end = (at + random.below(64)).min(bytes.len());
                let piece = bytes[at.min(end)..end].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            _ => {
                let end = (at + random.below(64)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
        }
    }
}

/// Changes nodes of a JSON text by its structure; other texts by their bytes.
pub fn json(text: &mut Vec<u8>, random: &mut Random) {
    if random.one_in(8) {
        return bytes(text, random);
    }
    let Ok(mut value) = serde_json::from_slice::<Value>(text) else { return bytes(text, random) };
    for _ in 0..=random.below(2) {
        change(&mut value, random);
    }
    *text = value.to_string().into_bytes();
}

/// A value of an unexpected type or size.
fn strange(random: &mut Random) -> Value {
    match random.below(12) {
        0 => Value::Null,
        1 => json!(random.one_in(2)),
        2..=4 => json!(random.pick(&NUMBERS)),
        5 => json!(random.pick(&[-1.0, -0.0, 0.5, 1e-300, 1e20, 1e308, -1e308, 1.5])),
        6 => json!(random.pick(&["", "x", "0", "../../x", "\u{1b}[2J", "int4-g128", "float16", "llama", "default"])),
        7 => json!([]),
        8 => json!({}),
        9 => {
            let mut size = || random.pick(&NUMBERS);
            json!([size(), size(), size()])
        }
        10 => json!([random.pick(&NUMBERS), random.pick(&NUMBERS)]),
        _ => (0..100).fold(json!(1), |inner, _| json!([inner])),
    }
}

/// Changes one node, chosen uniformly.
fn change(value: &mut Value, random: &mut Random) {
    let n = count(value);
    let mut at = random.below(n);
    let other = random.below(n);
    let donor = random.one_in(6).then(|| nth(value, &mut { other }).cloned()).flatten();
    change_at(value, &mut at, donor, random);
}

fn children(value: &Value) -> Box<dyn Iterator<Item = &Value> + '_> {
    match value {
        Value::Array(items) => Box::new(items.iter()),
        Value::Object(fields) => Box::new(fields.values()),
        _ => Box::new(std::iter::empty()),
    }
}

fn count(value: &Value) -> usize {
    1 + children(value).map(count).sum::<usize>()
}

fn nth<'a>(value: &'a Value, at: &mut usize) -> Option<&'a Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    children(value).find_map(|child| nth(child, at))
}

/// Whether the node was found below `value`.
fn change_at(value: &mut Value, at: &mut usize, donor: Option<Value>, random: &mut Random) -> bool {
    if *at == 0 {
        match (value, donor) {
            (value, Some(donor)) => *value = donor,
            (Value::Number(number), None) if random.one_in(2) => *number = near(number, random),
            (Value::Object(fields), None) if random.one_in(2) => change_fields(fields, random),
            (Value::Array(items), None) if random.one_in(2) => match items.is_empty() || random.one_in(2) {
                true => items.push(strange(random)),
                false => drop(items.pop()),
            },
            (value, None) => *value = strange(random),
        }
        return true;
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter_mut().any(|item| change_at(item, at, donor.clone(), random)),
        Value::Object(fields) => fields.values_mut().any(|field| change_at(field, at, donor.clone(), random)),
        _ => false,
    }
}

/// A number close to another.
fn near(number: &serde_json::Number, random: &mut Random) -> serde_json::Number {
    let n = number.as_u64().unwrap_or(1);
    random
        .pick(&[n.wrapping_add(1), n.wrapping_sub(1), n.wrapping_mul(2), n / 2, n.wrapping_mul(1 << 32), n ^ 1])
        .into()
}

fn change_fields(fields: &mut Map<String, Value>, random: &mut Random) {
    let keys: Vec<String> = fields.keys().cloned().collect();
    if keys.is_empty() {
        fields.insert("x".into(), strange(random));
        return;
    }
    let key = random.pick(&keys);
    let taken = fields.remove(&key).unwrap_or_default();
    match random.below(3) {
        // The field is removed.
        0 => {}
        1 => drop(fields.insert(format!("{key}.x"), taken)),
        _ => {
            fields.insert(key, taken.clone());
            fields.insert(random.pick(&keys), taken);
        }
    }
}

/// Floats whose squares, sums or inverses overflow f32, or that are not finite.
const FLOATS: [f32; 10] = [0.0, -0.0, 1e-45, 1e-20, 2e19, -2e19, 3.3e38, f32::MAX, f32::INFINITY, f32::NAN];

/// Replaces a run of values, by one value or by several.
fn floats(data: &mut [u8], random: &mut Random) {
    let n = data.len() / 4;
    let first = random.below(n);
    let len = if random.one_in(2) { n } else { random.below(n) };
    let value = random.pick(&FLOATS);
    for word in data.chunks_exact_mut(4).skip(if len == n { 0 } else { first }).take(len) {
        let value = if random.one_in(4) { random.pick(&FLOATS) } else { value };
        // In a file of f16 the bytes are two numbers.
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Changes the header of a safetensors file by its structure and corrects its length, or changes its values; changes
/// other files by their bytes.
pub fn safetensors(file: &mut Vec<u8>, random: &mut Random) {
    let header = file.first_chunk::<8>().map(|n| u64::from_le_bytes(*n) as usize);
    match header.filter(|n| n.checked_add(8).is_some_and(|end| end <= file.len())) {
        Some(n) if random.one_in(4) => floats(&mut file[8 + n..], random),
        Some(n) if !random.one_in(3) => {
            let mut header = file[8..8 + n].to_vec();
            json(&mut header, random);
            *file = [&(header.len() as u64).to_le_bytes(), header.as_slice(), &file[8 + n..]].concat();
        }
        _ => bytes(file, random),
    }
}

/// Changes values of a file of statistics, whose header is stored as the bytes of a tensor.
pub fn statistics(file: &mut Vec<u8>, random: &mut Random) {
    let Ok(tensors) = safetensors::SafeTensors::deserialize(file) else { return bytes(file, random) };
    if random.one_in(3) {
        return safetensors(file, random);
    }
    let mut changed = Vec::new();
    for (name, view) in tensors.iter() {
        let (mut shape, mut data) = (view.shape().to_vec(), view.data().to_vec());
        if name == "header" {
            json(&mut data, random);
            shape = vec![data.len()];
        } else if random.one_in(16) {
            data.truncate(random.below(data.len() / 4 + 1) * 4);
            shape = vec![data.len() / 4];
        }
        changed.push((name.to_string(), view.dtype(), shape, data));
    }
    let views = changed.iter().map(|(name, dtype, shape, data)| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), data);
        (name.as_str(), view.unwrap())
    });
    let serialized = safetensors::serialize(views, None).unwrap();
    *file = serialized;
}

/// Changes a piece of a journal, and usually corrects its checksum.
pub fn piece(file: &mut Vec<u8>, random: &mut Random) {
    const PREFIX: usize = 12;
    let length = file.first_chunk::<8>().map(|n| u64::from_le_bytes(*n) as usize);
    match length.filter(|n| PREFIX + n <= file.len()) {
        Some(n) if !random.one_in(3) => {
            let mut header = file[PREFIX..PREFIX + n].to_vec();
            json(&mut header, random);
            let rest = [header.as_slice(), &file[PREFIX + n..]].concat();
            *file = [&(header.len() as u64).to_le_bytes()[..], &[0; 4], &rest].concat();
        }
        _ => bytes(file, random),
    }
    if file.len() >= PREFIX && !random.one_in(8) {
        let checksum = crc32fast::hash(&file[PREFIX..]);
        file[8..PREFIX].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// Changes a Jinja template: inserts pieces that grow, nest or never end after some of its tags, or changes bytes.
pub fn template(text: &mut Vec<u8>, random: &mut Random) {
    // No concatenation of lists: abandoned threads would fill the memory of this process.
    const PIECES: [&str; 15] = [
        "{% set ns = namespace(x='ab', l=[1]) %}",
        "{% for i in range(99999) %}",
        "{% for i in range(300) %}",
        "{% endfor %}",
        "{% set ns.x = ns.x ~ ns.x %}",
        "{% set ns.l = [ns.l, ns.l] %}",
        "{% set ns.l = ns %}",
        "{{ ns }}",
        "{{ ns.l | tojson(indent=9) }}",
        "{{ messages | tojson | replace('', 'abcabcabc') }}",
        "{{ 'x' * 99999999 }}",
        "{{ ns.x[::-1] }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ messages | map(attribute='content') | list | join(ns.x) }}",
        "{{ (1 << 62) // 0 }}{{ 9223372036854775807 * 9 }}{{ 2 ** 9999 }}",
    ];
    if random.one_in(4) {
        return bytes(text, random);
    }
    for _ in 0..=random.below(8) {
        let ends: Vec<usize> = (2..=text.len()).filter(|&at| matches!(&text[at - 2..at], b"%}" | b"}}")).collect();
        let at = if ends.is_empty() || random.one_in(6) { 0 } else { random.pick(&ends) };
        let piece = random.pick(&PIECES);
        text.splice(at..at, piece.bytes());
    }
}

/// Changes lines of a TOML text: their values, or bytes anywhere.
pub fn toml(text: &mut Vec<u8>, random: &mut Random) {
    if random.one_in(4) {
        return bytes(text, random);
    }
    let read = String::from_utf8_lossy(text).into_owned();
    let mut lines: Vec<String> = read.lines().map(String::from).collect();
    for _ in 0..=random.below(2) {
        let at = random.below(lines.len());
        let Some(line) = lines.get_mut(at) else { break };
        let key = line.split('=').next().unwrap_or_default().trim().to_string();
        let value = match random.below(6) {
            0 => "\"\"".into(),
            1 => ["nan", "inf", "-inf", "-1", "0", "1e308"][random.below(6)].into(),
            2 => format!(
                "\"{}\"",
                random.pick(&["x", "fixed:0", "fixed:18446744073709551615", "9EiB", "rtn-int2-g8", "[", "**"])
            ),
            3 => "[".repeat(random.below(2000)),
            _ => strange(random).to_string(),
        };
        *line = format!("{key} = {value}");
        if random.one_in(6) {
            lines.remove(at);
        }
    }
    *text = lines.join("\n").into_bytes();
}

/// Changes the file after the first line, which has its name, according to its extension.
pub fn named(input: &mut Vec<u8>, random: &mut Random) {
    let Some(end) = input.iter().position(|&b| b == b'\n') else { return };
    let mut content = input.split_off(end + 1);
    let name = String::from_utf8_lossy(&input[..end]).into_owned();
    match name.rsplit('.').next() {
        Some("json") => json(&mut content, random),
        Some("safetensors") => safetensors(&mut content, random),
        _ => bytes(&mut content, random),
    }
    input.extend(content);
}
