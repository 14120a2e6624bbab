//! The quantizations of other tools that are read: a new one is a file of this room, and its line here.

use super::layout::Method;
use super::{awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4};

/// Every method, by its name in `quantization_config`.
static METHODS: [Method; 7] = [
    awq::METHOD,
    bitsandbytes::METHOD,
    compressed_tensors::METHOD,
    fp8::METHOD,
    fp8::FBGEMM,
    gptq::METHOD,
    mxfp4::METHOD,
];

/// The method of this name; `None` if it is not read.
pub fn method(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.name == name)
}

/// The names of all methods.
pub fn names() -> impl Iterator<Item = &'static str> {
    METHODS.iter().map(|method| method.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_has_its_key_among_its_parts() {
        for layout in METHODS.iter().flat_map(|method| method.layouts) {
            assert!(layout.parts.contains(&layout.key), "{layout:?}");
        }
        assert!(names().all(|name| method(name).is_some()) && method("quip").is_none());
    }
}
