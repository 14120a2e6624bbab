//! `lrc eval`.

use anyhow::Result;
use clap::builder::PossibleValue;
use clap::{Arg, Args, ValueEnum};

use super::arguments::{
    DeviceArgs, GateArgs, MemoryArgs, ReferenceArgs, ScoredText, SourceArgs, at_least_1, at_least_2,
};
use super::options::{Options, Selection};
use super::terminal::{Bars, fixed, grouped, table};
use crate::checkpoint::Checkpoint;
use crate::device::Device;
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

/// Measure perplexity, and the divergence from a reference model
///
/// Reads plain checkpoints and every output of `lrc compress`, one block at a
/// time. For encoders, compares hidden states and pooled embeddings with those
/// of the reference.
///
/// Examples:
///   lrc eval MODEL --text wiki.test.raw
///   lrc eval MODEL --text wiki.test.raw --convention llamacpp --json
///   lrc eval MODEL --text wiki.test.raw --convention all
///   lrc eval OUT --text wiki.test.raw --reference MODEL --fail-if 'ppl > 12'
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, mut_arg("convention", |convention| convention.long_help(CONVENTION)))]
pub(super) struct EvalArgs {
    #[command(flatten)]
    model: SourceArgs,

    #[command(flatten)]
    reference: ReferenceArgs,

    #[command(flatten)]
    scored: ScoredText<Asked>,

    #[command(flatten)]
    options: Options<Reading>,

    /// Step between windows, `hf-strided` [default: 512]
    ///
    /// It is a number of tokens, by default at most half a window.
    #[arg(long, value_name = "N", value_parser = at_least_1, help_heading = "Evaluation")]
    stride: Option<usize>,

    /// Whether the text begins with BOS
    #[arg(long, value_enum, default_value_t, help_heading = "Evaluation")]
    bos: Bos,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    gates: GateArgs,
}

/// The help of `--convention` for models of every kind.
const CONVENTION: &str = "How the text is cut and scored [default: gptq]\n\nFor encoders the default is masked, or no \
                          scoring with `--reference`.";

/// How the text is read.
#[derive(Debug)]
struct Reading;

impl Selection for Reading {
    fn takes(id: &str) -> bool {
        ["field", "seq_len"].contains(&id)
    }

    fn adapt(flag: Arg) -> Arg {
        const LENGTH: &str = "Tokens per window [default: set by the convention]";
        let flag = flag.help_heading("Evaluation");
        match flag.get_id().as_str() {
            "seq_len" => flag
                .value_parser(at_least_2)
                .help(LENGTH)
                .long_help(format!("{LENGTH}\n\nIt is at most the model's context.")),
            _ => flag,
        }
    }
}

/// The values of `--convention`.
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
            Self::All => Some(PossibleValue::new("all").help("All of gptq, hf-strided, llamacpp and lm-eval")),
            Self::Masked => Some(PossibleValue::new("masked").help(
                "Pseudo-perplexity of encoders with a masked-LM head: each token is masked in turn (Salazar et al. 2020)",
            )),
        }
    }
}

pub(super) fn run(args: &EvalArgs, progress: &Bars) -> Result<()> {
    check_gates(args)?;
    let device = args.device.open()?;
    let checkpoint = args.model.open(progress)?;
    let is_encoder = ModelConfig::of(&checkpoint)?.1.encoder.is_some();
    let opened = args.reference.open(progress)?;
    let reference = opened.as_ref().map(|(name, checkpoint)| Reference { checkpoint, name });
    let run = Run { args, checkpoint: &checkpoint, reference: reference.as_ref(), device, progress };
    match args.scored.convention {
        None | Some(Asked::Masked) if is_encoder => run.encoder(),
        Some(Asked::Masked) => {
            Err(Failure::unsupported("`--convention masked` is for encoders: this model does not see future tokens")
                .hint("leave `--convention` out, or choose one for causal models")
                .into())
        }
        Some(Asked::All) => run.all(),
        None => run.one(Convention::Gptq),
        Some(Asked::One(convention)) => run.one(convention),
    }
}

/// Checks the fields of the gates before the model is opened. The report depends on the model: a
/// field of either kind will do.
fn check_gates(args: &EvalArgs) -> Result<()> {
    let gates = &args.gates.fail_if;
    let for_encoders = || gate::expect_fields::<EncoderReport>(gates, &absent_for_encoders(args));
    match args.scored.convention {
        Some(Asked::Masked) => for_encoders(),
        None | Some(Asked::One(_)) => {
            gate::expect_fields::<PerplexityReport>(gates, &absent(args)).or_else(|e| for_encoders().map_err(|_| e))
        }
        Some(Asked::All) => {
            let absent: Vec<_> =
                absent(args).into_iter().map(|(fields, hint)| (in_all_conventions(&fields), hint)).collect();
            gate::expect_fields::<AllConventionsReport>(gates, &absent)
        }
    }
}

/// Fields of a report of perplexity that this run does not fill, with what would fill them.
fn absent(args: &EvalArgs) -> Vec<(Vec<Field>, &'static str)> {
    match args.reference.reference {
        Some(_) => vec![],
        None => vec![(fields::<DivergenceRecord>(), "`--reference MODEL` measures it")],
    }
}

/// Fields of an encoder's report that this run does not fill.
fn absent_for_encoders(args: &EvalArgs) -> Vec<(Vec<Field>, &'static str)> {
    let mut absent = Vec::new();
    if args.reference.reference.is_none() {
        absent.push((fields::<FidelityRecord>(), "`--reference MODEL` measures it"));
    } else if args.scored.convention.is_none() {
        absent.push((fields::<PseudoPerplexity>(), "`--convention masked` measures it"));
    }
    absent
}

/// The fields below the name of each convention.
fn in_all_conventions(fields: &[Field]) -> Vec<Field> {
    let names = ["gptq", "hf-strided", "llamacpp", "lm-eval"];
    names.iter().flat_map(|name| fields.iter().map(|field| field.within(name))).collect()
}

/// A model with what it is measured against.
struct Run<'a> {
    args: &'a EvalArgs,
    checkpoint: &'a Checkpoint,
    reference: Option<&'a Reference<'a>>,
    device: Device,
    progress: &'a Bars,
}

impl Run<'_> {
    fn one(&self, convention: Convention) -> Result<()> {
        let gates = &self.args.gates;
        gate::expect_fields::<PerplexityReport>(&gates.fail_if, &absent(self.args))?;
        gates.conclude(&self.perplexity(convention)?, show)
    }

    fn all(&self) -> Result<()> {
        let report = AllConventionsReport {
            gptq: self.perplexity(Convention::Gptq)?,
            hf_strided: self.perplexity(Convention::HfStrided)?,
            llamacpp: self.perplexity(Convention::Llamacpp)?,
            lm_eval: self.perplexity(Convention::LmEval)?,
        };
        self.args.gates.conclude(&report, show_all)
    }

    fn encoder(&self) -> Result<()> {
        let gates = &self.args.gates;
        gate::expect_fields::<EncoderReport>(&gates.fail_if, &absent_for_encoders(self.args))?;
        let masking = match (self.args.scored.convention, self.reference) {
            (None, Some(_)) => Masking::Never,
            _ => Masking::Always,
        };
        let settings = self.settings(Convention::Gptq);
        let report = eval::encoder(self.checkpoint, self.reference, masking, &settings, self.progress)?;
        gates.conclude(&report, show_encoder)
    }

    fn perplexity(&self, convention: Convention) -> Result<PerplexityReport> {
        eval::perplexity(self.checkpoint, self.reference, &self.settings(convention), self.progress)
    }

    fn settings(&self, convention: Convention) -> EvalSettings {
        let args = self.args;
        let takes_stride = args.scored.convention != Some(Asked::All) || convention.rules().takes_stride();
        EvalSettings {
            model: args.model.model().into(),
            text: args.scored.file.text.clone(),
            field: args.options.values.field.clone().unwrap_or_else(|| DEFAULT_FIELD.into()),
            convention,
            seq_len: args.options.values.seq_len,
            stride: args.stride.filter(|_| takes_stride),
            max_windows: args.scored.max_windows,
            bos: args.bos,
            memory_bytes: args.memory.bytes(),
            device: self.device.clone(),
        }
    }
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
    let header = ["convention", "perplexity", "per token", "bits per byte", "KL", "scored tokens", "windows × length"];
    let table = table(&header, all.iter().map(row).collect());
    format!("{table}`lm-eval` reports word perplexity, the others token perplexity\n")
}

fn show(r: &PerplexityReport) -> String {
    let bos = match (r.bos.as_str(), r.bos_added) {
        ("auto", true) => "auto (added)",
        ("auto", false) => "auto (the tokenizer adds none)",
        _ => "never",
    };
    let is_by_word = r.ppl != r.token_ppl;
    let windows = match r.stride {
        Some(stride) => format!("{} × {}, stride {stride}", r.windows, r.seq_len),
        None => format!("{} × {}", r.windows, r.seq_len),
    };
    let mut rows = vec![
        (
            if is_by_word { "word perplexity" } else { "perplexity" },
            format!("{:.5} ± {:.5}", r.ppl, r.ppl_standard_error),
        ),
        ("bits per byte", format!("{:.5}", r.bits_per_byte)),
        ("Σ nll (nats)", format!("{:.4}", r.nll_sum)),
        ("scored tokens", grouped(r.scored_tokens)),
        ("windows × length", windows),
        ("convention", r.convention.clone()),
        ("BOS", bos.into()),
        ("compute dtype", r.compute_dtype.clone()),
        ("text", format!("{} (sha256 {}…)", r.text, &r.text_sha256[..12])),
        ("tokenizer", format!("sha256 {}…", &r.tokenizer_sha256[..12])),
        ("parameters", grouped(r.parameters)),
        ("bytes", grouped(r.size_bytes)),
        ("time", format!("{:.2} s, {:.0} tokens/s", r.elapsed_seconds, r.tokens_per_second)),
    ];
    if is_by_word {
        rows.insert(1, ("token perplexity", format!("{:.5}", r.token_ppl)));
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
        rows.push(("hidden states: cosine, mean and min", cosine(&f.states)));
        rows.push(("  relative error", format!("{:.6}", f.states.relative_error)));
        rows.push(("pooled: cosine, mean and min", format!("{} ({})", cosine(&f.pooled), f.pooling)));
        rows.push(("  relative error", format!("{:.6}", f.pooled.relative_error)));
    }
    if let Some(p) = &r.pseudo {
        rows.push(("pseudo-perplexity", format!("{:.5} ± {:.5}", p.pseudo_ppl, p.pseudo_ppl_standard_error)));
        rows.push(("Σ nll (nats)", format!("{:.4}", p.nll_sum)));
    }
    rows.extend([
        ("tokens", grouped(r.tokens)),
        ("windows × length", format!("{} × {}", r.windows, r.seq_len)),
        ("compute dtype", r.compute_dtype.clone()),
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
        ("top 5 agreement", format!("{} %", fixed(100.0 * d.top_5_agreement, 3))),
    ]
}
