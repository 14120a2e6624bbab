//! Rotary embeddings (Su et al. 2021), and their scaling to longer contexts. The formulas come from
//! `modeling_rope_utils` in transformers, with which models were trained or adapted.

use std::f64::consts::PI;

use anyhow::{Context, Result};
use candle_core::Tensor;
use serde::Deserialize;

use super::ops;
use crate::checkpoint::CONFIG_FILE;
use crate::device::Device;
use crate::error::Failure;

const CONFIG_HINT: &str = "compare `config.json` with the one of the original repository";

/// `rope_scaling` of transformers 4, `rope_parameters` of transformers 5.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct RopeScaling {
    rope_type: Option<String>,
    /// The older name of `rope_type`. transformers writes both, and reads this one if the other is absent.
    #[serde(rename = "type")]
    older_type: Option<String>,
    /// θ, the base of the frequencies.
    pub rope_theta: Option<f64>,
    /// Share of the values of a head that are rotated.
    pub partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    short_factor: Option<Vec<f64>>,
    long_factor: Option<Vec<f64>>,
    /// In families with one rotary embedding per kind of block, only these two are present.
    pub full_attention: Option<Box<RopeScaling>>,
    /// For blocks with a sliding window.
    pub sliding_attention: Option<Box<RopeScaling>>,
}

impl RopeScaling {
    fn named(&self) -> Option<&str> {
        self.rope_type.as_deref().or(self.older_type.as_deref())
    }

    /// The first of its numbers that is not positive although formulas require it, with its name.
    pub fn not_positive(&self) -> Option<(String, f64)> {
        let numbers = [
            ("rope_theta", self.rope_theta),
            ("factor", self.factor),
            ("low_freq_factor", self.low_freq_factor),
            ("high_freq_factor", self.high_freq_factor),
            ("original_max_position_embeddings", self.original_max_position_embeddings),
            ("attention_factor", self.attention_factor),
            ("partial_rotary_factor", self.partial_rotary_factor),
        ];
        let of_list = |list: &Option<Vec<f64>>| list.iter().flatten().copied().find(|&value| value <= 0.0);
        let lists = [("short_factor", &self.short_factor), ("long_factor", &self.long_factor)];
        let own = numbers.into_iter().find_map(|(name, value)| Some((name.to_string(), value.filter(|&v| v <= 0.0)?)));
        let own = own.or_else(|| lists.into_iter().find_map(|(name, list)| Some((name.to_string(), of_list(list)?))));
        let kinds = [("full_attention", &self.full_attention), ("sliding_attention", &self.sliding_attention)];
        own.or_else(|| {
            kinds.into_iter().find_map(|(kind, scaling)| {
                let (name, value) = scaling.as_ref()?.not_positive()?;
                Some((format!("{kind}.{name}"), value))
            })
        })
    }

    /// Whether it has one embedding per kind of block.
    pub fn is_by_kind(&self) -> bool {
        self.full_attention.is_some() || self.sliding_attention.is_some()
    }
}

/// One rotary embedding of a model.
#[derive(Debug, Clone)]
pub struct RopeSettings {
    /// The base of the frequencies.
    pub theta: f64,
    /// Number of leading values of a head that are rotated.
    pub width: usize,
    /// How frequencies are changed for long contexts.
    pub scaling: Option<RopeScaling>,
    /// `max_position_embeddings`, and its value before the context was extended, if the config has it.
    pub context: Option<f64>,
    /// `original_max_position_embeddings`.
    pub original_context: Option<f64>,
}

impl RopeSettings {
    /// Inverse frequencies without any scaling: θ^(−2i / width).
    pub fn plain(&self) -> Vec<f64> {
        inverse_frequencies(self.theta, self.width)
    }

    /// `rope_type` of the scaling; `default` if there is none.
    pub fn rope_type(&self) -> &str {
        match self.scaling.as_ref().and_then(RopeScaling::named).unwrap_or("default") {
            // Sections of a head are rotated by the time, height and width of a token, which are equal for text.
            "mrope" => "default",
            kind => kind,
        }
    }

    /// Inverse frequencies (width / 2) for windows of up to `n_positions`, and the scale of cosines and sines.
    ///
    /// # Errors
    /// The type of scaling is not supported, or a field is missing.
    pub fn frequencies(&self, n_positions: usize) -> Result<(Vec<f64>, f64)> {
        let plain = self.plain();
        let Some(s) = &self.scaling else { return Ok((plain, 1.0)) };
        match self.rope_type() {
            "default" => Ok((plain, 1.0)),
            "linear" => {
                let factor = field("factor", s.factor)?;
                Ok((plain.into_iter().map(|f| f / factor).collect(), 1.0))
            }
            // Beyond the context, frequencies fall with the length of the window (NTK-aware, "dynamic").
            "dynamic" => {
                let (factor, context) = (field("factor", s.factor)?, field("max_position_embeddings", self.context)?);
                let length = (n_positions as f64).max(context);
                let width = self.width as f64;
                let growth = (factor * length / context - (factor - 1.0)).powf(width / (width - 2.0));
                Ok((inverse_frequencies(self.theta * growth, self.width), 1.0))
            }
            "llama3" => {
                let factor = field("factor", s.factor)?;
                let (low, high) =
                    (field("low_freq_factor", s.low_freq_factor)?, field("high_freq_factor", s.high_freq_factor)?);
                let context = self.original(s)?;
                Ok((plain.into_iter().map(|f| llama3_frequency(f, factor, low, high, context)).collect(), 1.0))
            }
            "yarn" => {
                let factor = self.stretch(s)?;
                let frequencies = self.yarn(s, plain, factor, self.original(s)?);
                let own = match (s.mscale, s.mscale_all_dim) {
                    (Some(own), Some(all)) if own != 0.0 && all != 0.0 => {
                        yarn_scale(own, factor) / yarn_scale(all, factor)
                    }
                    _ => yarn_scale(1.0, factor),
                };
                Ok((frequencies, s.attention_factor.unwrap_or(own)))
            }
            "longrope" | "su" => self.longrope(s, plain, n_positions),
            other => Err(Failure::unsupported(format!("`rope_scaling` of type `{other}` is not supported"))
                .hint("supported: default, linear, dynamic, llama3, yarn, longrope")
                .into()),
        }
    }

    /// The context before it was extended. transformers prefers the field next to `rope_scaling`, which some configs
    /// have; without either it uses the context.
    fn original(&self, s: &RopeScaling) -> Result<f64> {
        let given = self.original_context.or(s.original_max_position_embeddings).or(self.context);
        field("original_max_position_embeddings", given)
    }

    /// The factor, or the ratio of the contexts if there is none.
    fn stretch(&self, s: &RopeScaling) -> Result<f64> {
        match s.factor {
            Some(factor) => Ok(factor),
            None => Ok(field("factor", self.context)? / self.original(s)?),
        }
    }

    /// LongRoPE (Ding et al. 2024): a divisor per frequency, chosen by whether windows exceed the context before it
    /// was extended.
    fn longrope(&self, s: &RopeScaling, plain: Vec<f64>, n_positions: usize) -> Result<(Vec<f64>, f64)> {
        let context = self.original(s)?;
        let (name, divisors) = match n_positions as f64 > context {
            true => ("long_factor", &s.long_factor),
            false => ("short_factor", &s.short_factor),
        };
        let Some(divisors) = divisors.as_ref().filter(|f| f.len() == plain.len()) else {
            let message = format!("`{name}` of `rope_scaling` does not have {} values", plain.len());
            return Err(Failure::unsupported(message).hint(CONFIG_HINT).into());
        };
        let factor = self.stretch(s)?;
        let own = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / context.ln()).sqrt() };
        let frequencies = plain.into_iter().zip(divisors).map(|(f, by)| f / by).collect();
        Ok((frequencies, s.attention_factor.unwrap_or(own)))
    }

    /// YaRN (Peng et al. 2023, "NTK-by-parts"): frequencies with many rotations in the context before it was extended
    /// are kept, those with few are stretched, and those in between are blended along a ramp.
    fn yarn(&self, s: &RopeScaling, plain: Vec<f64>, factor: f64, context: f64) -> Vec<f64> {
        let width = self.width as f64;
        let dimension = |turns: f64| width * (context / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        // 0 counts as absent, as in transformers.
        let [fast, slow] = [(s.beta_fast, 32.0), (s.beta_slow, 1.0)]
            .map(|(given, default)| given.filter(|&v| v != 0.0).unwrap_or(default));
        let (mut low, mut high) = (dimension(fast), dimension(slow));
        if s.truncate.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(width - 1.0));
        if low == high {
            high += 0.001;
        }
        let blend = |(i, f): (usize, f64)| {
            let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f / factor * stretched + f * (1.0 - stretched)
        };
        plain.into_iter().enumerate().map(blend).collect()
    }
}

fn field(name: &str, value: Option<f64>) -> Result<f64> {
    value.ok_or_else(|| Failure::unsupported(format!("`rope_scaling` lacks `{name}`")).hint(CONFIG_HINT).into())
}

/// YaRN's scale of cosines and sines.
fn yarn_scale(mscale: f64, factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// Inverse frequencies θ^(−2i / width).
pub(super) fn inverse_frequencies(theta: f64, width: usize) -> Vec<f64> {
    (0..width / 2).map(|i| theta.powf(-2.0 * i as f64 / width as f64)).collect()
}

/// Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones are kept, and those in between are
/// blended by the number of rotations in the context before it was extended.
pub(super) fn llama3_frequency(frequency: f64, factor: f64, low: f64, high: f64, context: f64) -> f64 {
    let turns = context * frequency / (2.0 * PI);
    if turns < low {
        frequency / factor
    } else if turns > high {
        frequency
    } else {
        let share_kept = (turns - low) / (high - low);
        frequency * (share_kept + (1.0 - share_kept) / factor)
    }
}

/// The rotary embedding of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeKind {
    /// The embedding of all other blocks.
    Global,
    /// The embedding of blocks with a sliding window, if they have their own.
    Local,
}

/// The rotary embeddings of a model for all positions up to a length.
#[derive(Debug, Clone)]
pub struct Rope {
    global: Turns,
    local: Option<Turns>,
}

#[derive(Debug, Clone)]
struct Turns {
    /// (n_positions, width / 2)
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// # Errors
    /// The type of scaling is not supported.
    pub fn new(
        global: &RopeSettings,
        local: Option<&RopeSettings>,
        n_positions: usize,
        device: &Device,
    ) -> Result<Self> {
        let local = local.map(|settings| Turns::new(settings, n_positions, device)).transpose()?;
        Ok(Self { global: Turns::new(global, n_positions, device)?, local })
    }

    /// The same from a position on: what follows rotates the token there as its first.
    ///
    /// # Errors
    /// There is no such position.
    pub fn from(&self, first: usize) -> Result<Self> {
        let local = self.local.as_ref().map(|turns| turns.from(first)).transpose()?;
        Ok(Self { global: self.global.from(first)?, local })
    }

    /// Rotates `x` (batch, heads, n_tokens, head_dim).
    pub(super) fn rotate(&self, kind: RopeKind, x: &Tensor) -> Result<Tensor> {
        let turns = match (kind, &self.local) {
            (RopeKind::Local, Some(local)) => local,
            _ => &self.global,
        };
        let (n_tokens, head_dim) = (x.dim(2)?, x.dim(3)?);
        let (cos, sin) = (turns.cos.narrow(0, 0, n_tokens)?, turns.sin.narrow(0, 0, n_tokens)?);
        let width = 2 * cos.dim(1)?;
        if width == head_dim {
            return ops::rope(x, &cos, &sin);
        }
        let rotated = ops::rope(&x.narrow(3, 0, width)?.contiguous()?, &cos, &sin)?;
        // With a single head, candle joins them in another order of memory.
        Ok(Tensor::cat(&[&rotated, &x.narrow(3, width, head_dim - width)?], 3)?.contiguous()?)
    }
}

impl Turns {
    fn from(&self, first: usize) -> Result<Self> {
        let rest = |table: &Tensor| table.narrow(0, first, table.dim(0)? - first);
        Ok(Self { cos: rest(&self.cos)?, sin: rest(&self.sin)? })
    }

    fn new(settings: &RopeSettings, n_positions: usize, device: &Device) -> Result<Self> {
        let (frequencies, scale) = settings.frequencies(n_positions).with_context(|| format!("`{CONFIG_FILE}`"))?;
        // Angles in f64: position × frequency loses digits in f32 at long contexts. transformers
        // multiplies in f32; the two differ by its rounding.
        let angles: Vec<f64> = (0..n_positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f)).collect();
        let shape = (n_positions, frequencies.len());
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, shape, device);
        Ok(Self {
            cos: tensor(angles.iter().map(|a| (scale * a.cos()) as f32).collect())?,
            sin: tensor(angles.iter().map(|a| (scale * a.sin()) as f32).collect())?,
        })
    }
}
