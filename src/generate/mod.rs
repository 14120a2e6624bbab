//! Text from a model: one token after another, each drawn from the distribution that the model has after all before it.
//! All weights are in memory, in f32, and so are the keys and values of earlier tokens.

mod generator;
mod sampler;

use std::time::Instant;

use anyhow::Result;

pub use generator::Generator;
pub use sampler::{Sampler, Sampling};

use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::error::Failure;
use crate::model::config::window_length;
use crate::model::{Decoder, Objective};
use crate::progress::Progress;
use crate::report::{GeneratedRecord, Stop};
use crate::text::{Bos, Prompt, Tokenizer};

/// What is generated.
#[derive(Debug, Clone)]
pub struct GenerateSettings {
    /// The model as the user named it.
    pub model: String,
    /// What the text continues.
    pub prompt: Prompt,
    /// The most tokens that are generated.
    pub max_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// The device that runs the model.
    pub device: Device,
}

/// Generates a text. `say` gets it piece by piece, as soon as a token completes one; special tokens are not shown.
///
/// # Errors
/// The model cannot be run, is an encoder, or has no tokenizer; the prompt has no token or leaves no room in the model's
/// context; or `say` fails.
pub fn generate(
    checkpoint: &Checkpoint,
    settings: &GenerateSettings,
    progress: &dyn Progress,
    say: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<GeneratedRecord> {
    let decoder = Decoder::open(checkpoint)?.on(&settings.device);
    if decoder.objective() != Objective::NextToken {
        return Err(Failure::unsupported(format!("`{}` is an encoder, which predicts no next token", settings.model))
            .hint("`lrc eval` compares the states of encoders")
            .into());
    }
    let tokenizer = Tokenizer::open(checkpoint)?;
    let prompt = tokenizer.encode(&settings.prompt.text(checkpoint)?, Bos::Auto)?.ids;
    if prompt.is_empty() {
        return Err(Failure::usage("the prompt has no tokens, and the tokenizer adds none")
            .hint("give a prompt that is not empty")
            .into());
    }
    let context = window_length(checkpoint, None, Some(usize::MAX))?;
    let room = context.saturating_sub(prompt.len());
    if room == 0 {
        let message = format!("the prompt has {} tokens, and the model's context {context}", prompt.len());
        return Err(Failure::usage(message).hint("give a shorter prompt").into());
    }
    let most = settings.max_new_tokens.min(room);
    let loading = Instant::now();
    let mut generator = Generator::new(&decoder, prompt.len() + most, progress)?;
    let load_seconds = loading.elapsed().as_secs_f64();
    let (ends, mut sampler) = (tokenizer.ends(checkpoint), Sampler::new(&settings.sampling));
    let (mut decode, mut text, mut tokens) = (tokenizer.decoding(), String::new(), Vec::new());
    // Whether the first token begins with a space depends on what it follows.
    prompt.iter().try_for_each(|&token| decode(token).map(drop))?;
    let mut stop = if most < settings.max_new_tokens { Stop::Context } else { Stop::Length };
    let started = Instant::now();
    let mut logits = generator.read(&prompt)?;
    let prompt_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    loop {
        let token = sampler.draw(&logits);
        if ends.contains(&token) {
            stop = Stop::End;
            break;
        }
        tokens.push(token);
        if let Some(piece) = decode(token)? {
            say(&piece)?;
            text.push_str(&piece);
        }
        if tokens.len() >= most {
            break;
        }
        logits = generator.read(&[token])?;
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(GeneratedRecord {
        model: settings.model.clone(),
        text,
        tokens,
        stop,
        load_seconds,
        prompt_tokens: prompt.len(),
        prompt_seconds,
        seconds,
    })
}
