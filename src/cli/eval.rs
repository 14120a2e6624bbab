//! `lrc eval`.

use std::path::PathBuf;

use anyhow::Result;
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};

use super::terminal::{Bars, fixed, grouped, table};
use super::{GateArgs, MemoryArgs, ModelArgs, open};
use crate::error::Failure;
use crate::eval::conventions::Convention;
use crate::eval::{self, EvalSettings, Masking, Reference};
use crate::model::ModelConfig;
use crate::report::gate;
use crate::report::schema::{Field, fields};
use crate::report::{
    Agreement, AllConventionsReport, DivergenceRecord, EncoderReport, FidelityRecord, PerplexityReport,
    PseudoPerplexity,
};
use crate::text::{Bos, DEFAULT_FIELD};

/// Measure perplexity in a named convention, and how far a model is from a reference
///
/// Reads plain checkpoints and everything that `lrc compress` writes, one block at a time. Of encoders hidden states and pooled
/// embeddings are compared.
///
/// Examples:
///   lrc eval MODEL --text wiki.test.raw
///   lrc eval MODEL --text wiki.test.raw --convention llamacpp --json
///   lrc eval MODEL --text wiki.test.raw --convention all
///   lrc eval COMPRESSED --text wiki.test.raw --reference MODEL --fail-if 'kl.mean > 0.05' --fail-if 'ppl > 12'
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Text to score: prose in UTF-8, or documents in `.jsonl`, `.ndjson`, `.json` or `.parquet`; each also as `.gz` or `.zst`
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Field that holds the text of a document
    #[arg(long, value_name = "NAME", default_value = DEFAULT_FIELD)]
    field: String,

    /// Model to measure the divergence from, usually the original
    #[arg(long, value_name = "MODEL")]
    reference: Option<String>,

    /// How the text is cut and scored [default: gptq; of encoders masked, or none with a reference]
    #[arg(long, value_enum)]
    convention: Option<Asked>,

    /// Tokens in a window [default: the convention's, at most the model's context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    seq_len: Option<u32>,

    /// Tokens between the beginnings of windows, in `hf-strided` [default: 512, at most half a window]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,

    /// Score only the first windows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_windows: Option<u32>,

    /// Whether the stream begins with BOS: auto where the tokenizer adds one
    #[arg(long, value_enum, default_value_t)]
    bos: Bos,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    gates: GateArgs,

    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// A convention, or all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    One(Convention),
    All,
    Masked,
}

impl ValueEnum for Asked {
    fn value_variants<'a>() -> &'a [Self] {
        use Convention::{Gptq, HfStrided, Llamacpp, LmEval};
        &[Self::One(Gptq), Self::One(HfStrided), Self::One(Llamacpp), Self::One(LmEval), Self::All, Self::Masked]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::One(convention) => convention.to_possible_value(),
            Self::All => Some(PossibleValue::new("all").help("One after another: gptq, hf-strided, llamacpp and lm-eval")),
            Self::Masked => Some(PossibleValue::new("masked").help(
                "Of encoders with a masked-LM head, pseudo-perplexity: every token hidden in turn (Salazar et al. 2020)",
            )),
        }
    }
}

pub(super) fn run(args: &EvalArgs, progress: &Bars) -> Result<()> {
    let gates = &args.gates.fail_if;
    let asked = args.convention.unwrap_or(Asked::One(Convention::Gptq));
    let absent = match args.reference {
        Some(_) => vec![],
        None => vec![(fields::<DivergenceRecord>(), "`--reference MODEL` measures it")],
    };
    // What is measured depends on the model, which is opened after what can be known without.
    let of_encoder = || gate::expect_fields::<EncoderReport>(gates, &of_encoder_absent(args));
    match asked {
        Asked::Masked => of_encoder()?,
        Asked::One(_) => {
            gate::expect_fields::<PerplexityReport>(gates, &absent).or_else(|e| of_encoder().map_err(|_| e))?
        }
        Asked::All => {
            let names = ["gptq", "hf-strided", "llamacpp", "lm-eval"];
            let within = |(fields, hint): (Vec<Field>, _)| {
                let of = |name: &str| -> Vec<Field> { fields.iter().map(|field| field.within(name)).collect() };
                (names.iter().flat_map(|name| of(name)).collect(), hint)
            };
            gate::expect_fields::<AllConventionsReport>(
                gates,
                &absent.iter().cloned().map(within).collect::<Vec<_>>(),
            )?;
        }
    }
    let checkpoint = args.model.open(progress)?;
    let is_encoder = ModelConfig::of(&checkpoint)?.1.encoder.is_some();
    let settings = |convention| EvalSettings {
        model: args.model.model.clone(),
        text: args.text.clone(),
        field: args.field.clone(),
        convention,
        seq_len: args.seq_len.map(|n| n as usize),
        // Among all it is one convention's.
        stride: args.stride.map(|n| n as usize).filter(|_| asked != Asked::All || takes_stride(convention)),
        max_windows: args.max_windows.map(|n| n as usize),
        bos: args.bos,
        memory_bytes: args.memory.memory.as_u64(),
    };
    let reference = args.reference.as_deref().map(|name| open(name, "main", progress)).transpose()?;
    let named = args.reference.as_deref().unwrap_or_default();
    let reference = reference.as_ref().map(|checkpoint| Reference { checkpoint, name: named });
    let one = |convention| eval::perplexity(&checkpoint, reference.as_ref(), &settings(convention), progress);
    if is_encoder && matches!(args.convention, None | Some(Asked::Masked)) {
        of_encoder()?;
        let masking = match (args.convention, &reference) {
            (None, Some(_)) => Masking::Never,
            _ => Masking::Always,
        };
        let report = eval::encoder(&checkpoint, reference.as_ref(), masking, &settings(Convention::Gptq), progress)?;
        return args.gates.conclude(&report, args.json, show_encoder);
    }
    match asked {
        Asked::Masked => {
            Err(Failure::unsupported("the convention `masked` is for encoders: this model sees no future tokens")
                .hint("leave `--convention` out, or name that of a causal model")
                .into())
        }
        Asked::One(convention) => {
            gate::expect_fields::<PerplexityReport>(gates, &absent)?;
            args.gates.conclude(&one(convention)?, args.json, show)
        }
        Asked::All => {
            let report = AllConventionsReport {
                gptq: one(Convention::Gptq)?,
                hf_strided: one(Convention::HfStrided)?,
                llamacpp: one(Convention::Llamacpp)?,
                lm_eval: one(Convention::LmEval)?,
            };
            args.gates.conclude(&report, args.json, show_all)
        }
    }
}

/// Fields of an encoder's report that this run does not fill.
fn of_encoder_absent(args: &EvalArgs) -> Vec<(Vec<Field>, &'static str)> {
    let mut absent = Vec::new();
    if args.reference.is_none() {
        absent.push((fields::<FidelityRecord>(), "`--reference MODEL` measures it"));
    } else if args.convention.is_none() {
        absent.push((fields::<PseudoPerplexity>(), "`--convention masked` measures it"));
    }
    absent
}

fn takes_stride(convention: Convention) -> bool {
    convention.rules().takes_stride()
}

fn show_all(report: &AllConventionsReport) -> String {
    let all = [&report.gptq, &report.hf_strided, &report.llamacpp, &report.lm_eval];
    let row = |r: &&PerplexityReport| {
        let kl = r.divergence.as_ref().map_or("-".into(), |d| fixed(d.kl.mean, 6));
        vec![
            r.convention.clone(),
            format!("{:.5} ± {:.5}", r.ppl, r.ppl_standard_error),
            format!("{:.5}", r.token_ppl),
            format!("{:.5}", r.bits_per_byte),
            kl,
            grouped(r.scored_tokens),
            format!("{} × {}", r.windows, r.seq_len),
        ]
    };
    let header = ["convention", "perplexity", "a token", "bits per byte", "KL", "scored tokens", "windows × length"];
    let table = table(&header, all.iter().map(row).collect());
    format!("{table}`lm-eval` has the perplexity of a word, the others of a token\n")
}

fn show(r: &PerplexityReport) -> String {
    let bos = match (r.bos.as_str(), r.bos_added) {
        ("auto", true) => "auto (added)",
        ("auto", false) => "auto (the tokenizer adds none)",
        _ => "never",
    };
    let is_of_words = r.ppl != r.token_ppl;
    let windows = match r.stride {
        Some(stride) => format!("{} × {}, {stride} apart", r.windows, r.seq_len),
        None => format!("{} × {}", r.windows, r.seq_len),
    };
    let mut rows = vec![
        (
            if is_of_words { "perplexity of a word" } else { "perplexity" },
            format!("{:.5} ± {:.5}", r.ppl, r.ppl_standard_error),
        ),
        ("bits per byte", format!("{:.5}", r.bits_per_byte)),
        ("Σ nll (nats)", format!("{:.4}", r.nll_sum)),
        ("scored tokens", grouped(r.scored_tokens)),
        ("windows × length", windows),
        ("convention", r.convention.clone()),
        ("BOS", bos.into()),
        ("computed in", r.compute_dtype.clone()),
        ("text", format!("{} (sha256 {}…)", r.text, &r.text_sha256[..12])),
        ("tokenizer", format!("sha256 {}…", &r.tokenizer_sha256[..12])),
        ("parameters", grouped(r.parameters)),
        ("bytes", grouped(r.size_bytes)),
        ("time", format!("{:.2} s, {:.0} tokens/s", r.elapsed_seconds, r.tokens_per_second)),
    ];
    if is_of_words {
        rows.insert(1, ("perplexity of a token", format!("{:.5}", r.token_ppl)));
        rows.insert(2, ("words", grouped(r.scored_words)));
    }
    if let Some(d) = &r.divergence {
        rows.splice(1..1, divergence_rows(d));
    }
    table(&["measure", "value"], rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect())
}

fn show_encoder(r: &EncoderReport) -> String {
    let mut rows = Vec::new();
    if let Some(f) = &r.fidelity {
        rows.push(("reference", f.reference.clone()));
        let cosine = |a: &Agreement| format!("{}, {}", fixed(a.cosine_mean, 6), fixed(a.cosine_min, 6));
        rows.push(("hidden states: cosine, mean and least", cosine(&f.states)));
        rows.push(("  relative error", format!("{:.6}", f.states.relative_error)));
        rows.push(("pooled: cosine, mean and least", format!("{} ({})", cosine(&f.pooled), f.pooling)));
        rows.push(("  relative error", format!("{:.6}", f.pooled.relative_error)));
    }
    if let Some(p) = &r.pseudo {
        rows.push(("pseudo-perplexity", format!("{:.5} ± {:.5}", p.pseudo_ppl, p.pseudo_ppl_standard_error)));
        rows.push(("Σ nll (nats)", format!("{:.4}", p.nll_sum)));
    }
    rows.extend([
        ("tokens", grouped(r.tokens)),
        ("windows × length", format!("{} × {}", r.windows, r.seq_len)),
        ("computed in", r.compute_dtype.clone()),
        ("text", format!("{} (sha256 {}…)", r.text, &r.text_sha256[..12])),
        ("tokenizer", format!("sha256 {}…", &r.tokenizer_sha256[..12])),
        ("parameters", grouped(r.parameters)),
        ("bytes", grouped(r.size_bytes)),
        ("time", format!("{:.2} s", r.elapsed_seconds)),
    ]);
    table(&["measure", "value"], rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect())
}

fn divergence_rows(d: &DivergenceRecord) -> Vec<(&'static str, String)> {
    vec![
        ("reference", format!("{} (perplexity {})", d.reference, fixed(d.reference_ppl, 5))),
        ("ln (ppl / reference)", format!("{} ± {}", fixed(d.ln_ppl_ratio, 5), fixed(d.ln_ppl_ratio_standard_error, 5))),
        ("KL (reference ‖ model)", format!("{} ± {}", fixed(d.kl.mean, 6), fixed(d.kl.standard_error, 6))),
        ("  median, 99 %, max", format!("{}, {}, {}", fixed(d.kl.median, 6), fixed(d.kl.p99, 4), fixed(d.kl.max, 4))),
        (
            "KL (model ‖ reference)",
            format!("{} ± {}", fixed(d.reverse_kl.mean, 6), fixed(d.reverse_kl.standard_error, 6)),
        ),
        ("Δp, mean and RMS", format!("{} %, {} %", fixed(100.0 * d.delta_p.mean, 3), fixed(100.0 * d.delta_p_rms, 3))),
        ("  1 %, median, 99 %", {
            let [low, median, high] = [d.delta_p.p1, d.delta_p.median, d.delta_p.p99].map(|p| 100.0 * p);
            format!("{} %, {} %, {} %", fixed(low, 3), fixed(median, 3), fixed(high, 3))
        }),
        ("same top 1", format!("{} %", fixed(100.0 * d.same_top_1, 3))),
        ("top 5 in common", format!("{} %", fixed(100.0 * d.top_5_agreement, 3))),
    ]
}
