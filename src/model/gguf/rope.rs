//! Scaling of rotary embeddings: from the metadata of a file and its vectors of factors to the fields of a config.

use std::f64::consts::TAU;

use serde_json::{Map, Value as Json, json};

use super::super::rope::{inverse_frequencies, llama3_frequency};
use super::fields::shortest;
use crate::codecs::gguf::{Description, LONG_ROPE_FACTORS, ROPE_FACTORS};

/// `rope_scaling` of the config; `None` if nothing is scaled. `fields` has the other fields, under common names, and
/// `rotated` the share of a head that is rotated.
///
/// # Errors
/// A clause: the file scales in a way that no config of transformers describes.
pub(super) fn scaling(
    description: &Description<'_>,
    architecture: &str,
    fields: &Map<String, Json>,
    rotated: Option<f64>,
) -> Result<Option<Map<String, Json>>, String> {
    let number = |name: &str| {
        let number = description.number(&format!("{architecture}.rope.scaling.{name}"));
        number.map(|x| shortest(x as f32))
    };
    if let Some(scaling) = longrope(description, number("attn_factor"), fields)? {
        return Ok(Some(scaling));
    }
    let linear = |factor: Json| json!({"rope_type": "linear", "factor": factor});
    let scaling = match description.text(&format!("{architecture}.rope.scaling.type")).as_deref() {
        Some("none") => None,
        None | Some("linear") => {
            // Early files have the factor under another name.
            let early = description.number(&format!("{architecture}.rope.scale_linear"));
            let factor = number("factor").or(early.map(|x| shortest(x as f32)));
            factor.filter(|factor| *factor != json!(0.0)).map(linear)
        }
        Some("yarn") => {
            let mut scaling = json!({"rope_type": "yarn", "factor": number("factor")});
            for (theirs, ours) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(value) = number(theirs) {
                    scaling[ours] = value;
                }
            }
            if let Some(original) = fields.get("original_max_position_embeddings") {
                scaling["original_max_position_embeddings"] = original.clone();
            }
            Some(scaling)
        }
        Some(other) => return Err(format!("its rotary embedding has scaling of type `{other}`")),
    };
    if let Some(Json::Object(scaling)) = scaling {
        return Ok(Some(scaling).filter(|scaling| scaling["factor"] != json!(1.0)));
    }
    let Some(factors) = description.vector(ROPE_FACTORS) else { return Ok(None) };
    let [width, theta] = ["head_dim", "rope_theta"].map(|name| fields.get(name).and_then(Json::as_f64));
    let width = width.unwrap_or_default() * rotated.unwrap_or(1.0);
    // As many frequencies as there are factors, or none that fit.
    let plain = inverse_frequencies(theta.unwrap_or(10_000.0), (width as usize).min(2 * factors.len()));
    llama3(&plain, &factors)
        .ok_or_else(|| format!("the factors of its rotary frequencies (`{ROPE_FACTORS}`) are of an unknown kind"))
}

/// LongRoPE, from its two vectors of factors.
fn longrope(
    description: &Description<'_>,
    attention: Option<Json>,
    fields: &Map<String, Json>,
) -> Result<Option<Map<String, Json>>, String> {
    let [short, long] = LONG_ROPE_FACTORS.map(|name| description.vector(name));
    match (short, long) {
        (Some(short), Some(long)) => {
            let list = |factors: Vec<f32>| Json::from_iter(factors.into_iter().map(shortest));
            let mut scaling = Map::new();
            // transformers 4 takes these three fields only, and computes the scale of cosines and sines.
            scaling.insert("type".into(), "longrope".into());
            scaling.insert("short_factor".into(), list(short));
            scaling.insert("long_factor".into(), list(long));
            let is_other =
                |scale: &Json| longrope_scale(fields).zip(scale.as_f64()).is_none_or(|(own, s)| (own - s).abs() > 1e-3);
            let attention = attention.filter(is_other);
            scaling.extend(attention.map(|attention| ("attention_factor".to_string(), attention)));
            Ok(Some(scaling))
        }
        (None, None) => Ok(None),
        _ => Err(format!("it has only one of `{}` and `{}`", LONG_ROPE_FACTORS[0], LONG_ROPE_FACTORS[1])),
    }
}

/// The scale of cosines and sines that LongRoPE has by the contexts of a config.
fn longrope_scale(fields: &Map<String, Json>) -> Option<f64> {
    let [context, original] =
        ["max_position_embeddings", "original_max_position_embeddings"].map(|name| fields.get(name));
    let (context, original) = (context?.as_f64()?, original?.as_f64()?);
    let factor = context / original;
    Some(if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() })
}

/// The fields of Llama 3's scaling that divides `plain` frequencies by `factors`; an empty answer if all
/// factors are 1. Frequencies depend on the products of the original context with both ends of the ramp only,
/// so that the low end can be 1.
fn llama3(plain: &[f64], factors: &[f32]) -> Option<Option<Map<String, Json>>> {
    let factor = factors.iter().fold(1.0f64, |most, &f| most.max(f.into()));
    if factors.len() != plain.len() || !factors.iter().all(|&f| f.is_finite() && f >= 1.0) {
        return None;
    }
    if factor == 1.0 {
        return Some(None);
    }
    let fits = |&(context, high): &(f64, f64)| {
        let scaled = plain.iter().map(|&f| f / llama3_frequency(f, factor, 1.0, high, context));
        // Factors were computed in f32, which the ramp magnifies.
        scaled.zip(factors).all(|(found, &factor)| (found / f64::from(factor) - 1.0).abs() < 1e-4)
    };
    // Contexts of published models come first; they fit up to rounding, and are the numbers of their configs.
    let usual = (5..=20).rev().map(|exponent| (f64::from(1u32 << exponent), 4.0));
    let usual = std::iter::once((8192.0, 4.0)).chain(usual);
    let (context, high) = usual.chain(solved(plain, factors, factor)).find(|ramp| fits(ramp))?;
    let scaling = json!({
        "rope_type": "llama3", "factor": shortest(factor as f32), "low_freq_factor": 1.0, "high_freq_factor": high,
        "original_max_position_embeddings": if context.fract() == 0.0 { json!(context as u64) } else { json!(context) },
    });
    Some(scaling.as_object().cloned())
}

/// The original context and the high end of the ramp, from two frequencies that are neither kept nor
/// stretched by the whole factor.
fn solved(plain: &[f64], factors: &[f32], factor: f64) -> Option<(f64, f64)> {
    let blended: Vec<(f64, f64)> = plain
        .iter()
        .zip(factors)
        .filter(|(_, f)| (1.0 + 1e-6..factor * (1.0 - 1e-6)).contains(&f64::from(**f)))
        // The share that is kept of a frequency is linear in it.
        .map(|(&plain, &f)| (plain, (1.0 / f64::from(f) - 1.0 / factor) / (1.0 - 1.0 / factor)))
        .collect();
    let (&(first, kept), &(last, less)) = (blended.first()?, blended.last().filter(|_| blended.len() > 1)?);
    let slope = (kept - less) / (first - last);
    let below = slope * last - less;
    // kept = (context · frequency / 2π − low) / (high − low), with low = 1.
    let high = 1.0 + 1.0 / below;
    (below > 0.0).then_some((slope * TAU * (high - 1.0), high))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(plain: &[f64], factor: f64, high: f64, context: f64) -> Vec<f32> {
        plain.iter().map(|&f| (f / llama3_frequency(f, factor, 1.0, high, context)) as f32).collect()
    }

    #[test]
    fn scaling_is_found_from_its_factors() {
        for (width, theta, factor, high, context) in [
            (128, 500_000.0, 8.0, 4.0, 8192.0),
            (64, 500_000.0, 32.0, 4.0, 8192.0),
            (64, 10_000.0, 4.0, 4.0, 2048.0),
            (64, 10_000.0, 4.0, 9.0, 1000.0),
        ] {
            let plain = inverse_frequencies(theta, width);
            let given = factors(&plain, factor, high, context);
            let found = llama3(&plain, &given).unwrap().unwrap();
            let number = |name: &str| found[name].as_f64().unwrap();
            let again = factors(
                &plain,
                number("factor"),
                number("high_freq_factor"),
                number("original_max_position_embeddings"),
            );
            assert!(again.iter().zip(&given).all(|(a, b)| (a / b - 1.0).abs() < 1e-5), "{found:?}");
            if high == 4.0 {
                assert_eq!(number("original_max_position_embeddings"), context);
            }
        }
        let plain = inverse_frequencies(10_000.0, 16);
        assert_eq!(llama3(&plain, &[1.0; 8]), Some(None));
        assert_eq!(llama3(&plain, &[1.0; 7]), None);
        assert_eq!(llama3(&plain, &[1.0, 3.0, 1.5, 1.0, 2.0, 1.0, 1.0, 4.0]), None);
    }
}
