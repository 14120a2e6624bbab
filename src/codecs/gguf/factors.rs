//! The factors of a LoRA adapter: `W.lora_a` (r, in) and `W.lora_b` (out, r) over the weight `W`.

use super::super::peft::Factor;

/// The name of a factor over `weight`.
pub fn factor_name(weight: &str, factor: Factor) -> String {
    format!("{weight}.{}", suffix(factor))
}

/// The weight and the factor of a tensor; `None` if it is not a factor.
pub fn split_factor(tensor: &str) -> Option<(&str, Factor)> {
    let (weight, last) = tensor.rsplit_once('.')?;
    [Factor::A, Factor::B].into_iter().find(|&factor| suffix(factor) == last).map(|factor| (weight, factor))
}

fn suffix(factor: Factor) -> &'static str {
    match factor {
        Factor::A => "lora_a",
        Factor::B => "lora_b",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip() {
        for factor in [Factor::A, Factor::B] {
            assert_eq!(
                split_factor(&factor_name("blk.0.attn_q.weight", factor)),
                Some(("blk.0.attn_q.weight", factor))
            );
        }
        assert_eq!(split_factor("blk.0.attn_q.weight"), None);
        assert_eq!(split_factor("lora_a"), None);
    }
}
