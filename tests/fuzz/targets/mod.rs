//! Targets of the fuzzer: each maps bytes to a value or an error, for everything that is read from files.

mod checkpoints;
mod files;
mod sources;
mod texts;

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use lrc::checkpoint::Checkpoint;
use lrc::eval::conventions::Convention;
use lrc::eval::{EvalSettings, perplexity};
use lrc::model::inventory;
use lrc::progress::Silent;
use lrc::text::Bos;

use super::mutate::{self, Random};
use checkpoints::{
    of_configs, of_gguf, of_gguf_alone, of_weights, read_config, read_gguf, read_gguf_alone, read_weights,
};
use files::{of_outputs, of_pieces, of_recipes, of_statistics, read_output, read_piece, read_recipe, read_statistics};
use sources::{of_pytorch, of_quantized, read_pytorch, read_quantized};
use texts::{of_templates, of_texts, read_template, read_text};

pub struct Target {
    pub name: &'static str,
    /// Number of runs in CI: some seconds.
    pub runs_in_ci: u64,
    pub seeds: fn(&Bed) -> Vec<Vec<u8>>,
    pub mutate: fn(&mut Vec<u8>, &mut Random),
    /// Whether it was read; undamaged input must be.
    pub run: fn(&Bed, &[u8]) -> bool,
}

pub static TARGETS: [Target; 12] = [
    Target { name: "safetensors", runs_in_ci: 300, seeds: of_weights, mutate: mutate::safetensors, run: read_weights },
    Target { name: "gguf", runs_in_ci: 1000, seeds: of_gguf, mutate: mutate::bytes, run: read_gguf },
    Target { name: "gguf-alone", runs_in_ci: 500, seeds: of_gguf_alone, mutate: mutate::bytes, run: read_gguf_alone },
    Target { name: "pytorch", runs_in_ci: 3000, seeds: of_pytorch, mutate: mutate::bytes, run: read_pytorch },
    Target { name: "quantized", runs_in_ci: 1000, seeds: of_quantized, mutate: mutate::named, run: read_quantized },
    Target { name: "config", runs_in_ci: 1000, seeds: of_configs, mutate: mutate::named, run: read_config },
    Target { name: "recipe", runs_in_ci: 2000, seeds: of_recipes, mutate: mutate::toml, run: read_recipe },
    Target { name: "journal", runs_in_ci: 2000, seeds: of_pieces, mutate: mutate::piece, run: read_piece },
    Target {
        name: "statistics",
        runs_in_ci: 500,
        seeds: of_statistics,
        mutate: mutate::statistics,
        run: read_statistics,
    },
    Target { name: "outputs", runs_in_ci: 150, seeds: of_outputs, mutate: mutate::named, run: read_output },
    Target { name: "texts", runs_in_ci: 1000, seeds: of_texts, mutate: mutate::named, run: read_text },
    Target { name: "templates", runs_in_ci: 60, seeds: of_templates, mutate: mutate::template, run: read_template },
];

/// The folder with the files of a target.
pub struct Bed {
    folder: tempfile::TempDir,
}

impl Bed {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A folder of this name with these files, and those that it had before.
    fn folder(&self, name: &str, files: &[(&str, &[u8])]) -> PathBuf {
        let folder = self.path(name);
        fs::create_dir_all(&folder).unwrap();
        for (file, bytes) in files {
            fs::write(folder.join(file), bytes).unwrap();
        }
        folder
    }

    /// A copy of a fixture with a tokenizer.
    fn model(&self, name: &str) -> PathBuf {
        let from = fixture(&format!("pico/{name}"));
        let file = |file: &str| fs::read(from.join(file)).unwrap();
        let tokenizer = fs::read(fixture("pico/tokenizer.json")).unwrap();
        let files = ["config.json", "model.safetensors"].map(|name| (name, file(name)));
        let folder = self.folder(&format!("models/{name}"), &[("tokenizer.json", &tokenizer)]);
        files.iter().for_each(|(name, bytes)| fs::write(folder.join(name), bytes).unwrap());
        folder
    }

    /// The outcome of `lrc` with arguments in which `OUT` is a folder of this bed.
    fn lrc(&self, output: &str, args: &[&str]) -> PathBuf {
        let out = self.path(output);
        fs::create_dir_all(out.parent().unwrap()).unwrap();
        let args = args.iter().map(|arg| if *arg == "OUT" { out.to_str().unwrap() } else { arg });
        let cli = lrc::cli::Cli::try_parse_from(["lrc"].into_iter().chain(args).chain(["-q"])).unwrap();
        lrc::cli::run(&cli).unwrap();
        out
    }

    fn text(&self) -> PathBuf {
        let path = self.path("text.txt");
        if !path.exists() {
            let text = fs::read_to_string(fixture("text/held-out.txt")).unwrap();
            fs::write(&path, text.chars().take(2000).collect::<String>()).unwrap();
        }
        path
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Reads everything from an opened checkpoint.
fn read_all(checkpoint: &Checkpoint) -> bool {
    let weights = inventory::linears(checkpoint)
        .iter()
        .map(|linear| inventory::weight(checkpoint, linear).is_ok())
        .collect::<Vec<_>>();
    for info in checkpoint.tensors() {
        let _ = checkpoint.values(&info.name);
        let _ = checkpoint.storage(&info.name);
    }
    weights.into_iter().all(|is_read| is_read)
}

fn split_name(input: &[u8]) -> Option<(&str, &[u8])> {
    let end = input.iter().position(|&b| b == b'\n')?;
    Some((std::str::from_utf8(&input[..end]).ok()?, &input[end + 1..]))
}

/// One window in every convention; returns whether all succeeded.
fn evaluate(bed: &Bed, checkpoint: &Checkpoint) -> bool {
    let mut is_well = true;
    for convention in [Convention::Gptq, Convention::HfStrided, Convention::Llamacpp, Convention::LmEval] {
        let settings = EvalSettings {
            model: "m".into(),
            text: bed.text(),
            field: "text".into(),
            convention,
            seq_len: None,
            stride: None,
            max_windows: Some(1),
            bos: Bos::Auto,
            memory_bytes: 1 << 24,
            device: candle_core::Device::Cpu,
        };
        is_well &= perplexity(checkpoint, None, &settings, &Silent).is_ok();
    }
    is_well
}
