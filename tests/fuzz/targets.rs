//! What is fuzzed: a way from bytes to a value or an error, for everything that is read from files.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use clap::Parser;
use lrc::calibrate::Statistics;
use lrc::checkpoint::Checkpoint;
use lrc::compress::recipe::{Recipe, RecipeOptions};
use lrc::compress::{Job, compress};
use lrc::eval::conventions::Convention;
use lrc::eval::{EvalSettings, perplexity};
use lrc::export::{ExportJob, export};
use lrc::formats::Format;
use lrc::inspect::inspect;
use lrc::model::{Decoder, inventory};
use lrc::progress::Silent;
use lrc::store::Journal;
use lrc::text::{Bos, Text};
use lrc::truncate::{TruncateJob, truncate};

use super::mutate::{self, Random};

pub struct Target {
    pub name: &'static str,
    /// Runs of it in CI: some seconds.
    pub runs_in_ci: u64,
    pub seeds: fn(&Bed) -> Vec<Vec<u8>>,
    pub mutate: fn(&mut Vec<u8>, &mut Random),
    /// Whether it was read: what is undamaged must be.
    pub run: fn(&Bed, &[u8]) -> bool,
}

pub static TARGETS: [Target; 9] = [
    Target { name: "safetensors", runs_in_ci: 300, seeds: of_weights, mutate: mutate::safetensors, run: read_weights },
    Target { name: "gguf", runs_in_ci: 1000, seeds: of_gguf, mutate: mutate::bytes, run: read_gguf },
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

/// Where the files of a target are.
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

    /// A folder of this name that holds these files, and those that it held before.
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

    /// What `lrc` makes of arguments in which `OUT` is a folder of this bed.
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

/// Everything that can be read of an opened checkpoint.
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

fn of_weights(_: &Bed) -> Vec<Vec<u8>> {
    let file = |header: &str, data: &[u8]| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
    vec![
        file(
            r#"{"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
                "b":{"dtype":"I64","shape":[1],"data_offsets":[24,32]}}"#,
            &[60; 32],
        ),
        file(
            r#"{"l.0.x.lr_a.weight":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},
                "l.0.x.lr_b.weight":{"dtype":"F16","shape":[4,2],"data_offsets":[12,28]}}"#,
            &[60; 28],
        ),
        file(
            r#"{"x.lr_order":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},
                "x.lr_p.weight":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]},
                "x.lr_t.weight":{"dtype":"BF16","shape":[1,1],"data_offsets":[12,14]}}"#,
            &[1, 0, 0, 0, 0, 0, 0, 0, 60, 60, 60, 60, 60, 60],
        ),
        file(
            r#"{"e.experts.w":{"dtype":"F16","shape":[2,2,2],"data_offsets":[0,16]},
                "e.experts.v":{"dtype":"F16","shape":[0,2,2],"data_offsets":[16,16]}}"#,
            &[60; 16],
        ),
        file(
            r#"{"l.0.q_proj.weight":{"dtype":"F32","shape":[6,8],"data_offsets":[0,192]},
                "l.0.k_proj.weight":{"dtype":"BF16","shape":[8,6],"data_offsets":[192,288]}}"#,
            &(0..72u32).flat_map(|i| (1.0 + (i * i % 17) as f32).to_le_bytes()).collect::<Vec<u8>>(),
        ),
    ]
}

fn read_weights(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("weights", &[("model.safetensors", input)]);
    let Ok(checkpoint) = lrc::model::open(&folder) else { return false };
    let _ = inspect(&checkpoint, "m", None, &Silent);
    compress_all(bed, &checkpoint);
    read_all(&checkpoint) && inventory::split_stacks(checkpoint).is_ok_and(|split| read_all(&split))
}

/// By names and shapes, into factors and into codes.
fn compress_all(bed: &Bed, checkpoint: &Checkpoint) {
    for settings in ["keep = 0.7\nranks = \"uniform\"", "quant = [\"rtn-int4-channel\"]\nformat = \"dense\""] {
        let options: RecipeOptions = toml::from_str(settings).unwrap();
        let recipe = Recipe::new(&options).unwrap();
        let output = bed.path("compressed");
        let job = Job {
            checkpoint,
            source: "m",
            recipe: &recipe,
            output: &output,
            force: true,
            restart: true,
            memory_bytes: 1 << 24,
            device: candle_core::Device::Cpu,
        };
        let _ = compress(&job, &Silent);
    }
}

fn of_gguf(bed: &Bed) -> Vec<Vec<u8>> {
    let model = bed.model("llama");
    let model = model.to_str().unwrap();
    let exported = bed.lrc("gguf", &["export", model, "--format", "gguf", "-o", "OUT"]);
    let whole = fs::read(exported.join("model.gguf")).unwrap();
    bed.folder("read-gguf", &[("config.json", &fs::read(exported.join("config.json")).unwrap())]);
    // A file of a single value and a single tensor, in blocks.
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut small = [&b"GGUF"[..], &3u32.to_le_bytes(), &1u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
    small.extend([text("general.alignment"), 4u32.to_le_bytes().into(), 32u32.to_le_bytes().into()].concat());
    small.extend([text("blk.0.attn_q.weight"), 2u32.to_le_bytes().into()].concat());
    small.extend([32u64.to_le_bytes(), 8u64.to_le_bytes()].concat());
    small.extend([8u32.to_le_bytes().to_vec(), 0u64.to_le_bytes().into()].concat());
    small.resize(small.len().next_multiple_of(32) + 8 * 34, 1);
    vec![whole, small]
}

fn read_gguf(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("read-gguf", &[("model.gguf", input)]);
    lrc::model::open(&folder).is_ok_and(|checkpoint| read_all(&checkpoint))
}

const FAMILIES: [&str; 21] = [
    "bert",
    "distilbert",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "llava",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "opt-350m",
    "phi3",
    "qwen2",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "smolvlm",
];

/// `llama.json`, then its config.
fn of_configs(bed: &Bed) -> Vec<Vec<u8>> {
    let of = |family: &&str| {
        let model = bed.model(family);
        let config = fs::read(model.join("config.json")).unwrap();
        [format!("{family}.json\n").as_bytes(), &config].concat()
    };
    FAMILIES.iter().map(of).collect()
}

fn split_name(input: &[u8]) -> Option<(&str, &[u8])> {
    let end = input.iter().position(|&b| b == b'\n')?;
    Some((std::str::from_utf8(&input[..end]).ok()?, &input[end + 1..]))
}

fn read_config(bed: &Bed, input: &[u8]) -> bool {
    let Some((name, config)) = split_name(input) else { return false };
    let Some(family) = FAMILIES.iter().find(|family| name.strip_suffix(".json") == Some(**family)) else {
        return false;
    };
    let folder = bed.path(&format!("models/{family}"));
    fs::write(folder.join("config.json"), config).unwrap();
    let Ok(checkpoint) = lrc::model::open(&folder) else { return false };
    evaluate(bed, &checkpoint);
    let run = || {
        let decoder = Decoder::open(&checkpoint)?;
        decoder.states(&Tensor::new(&[[1u32, 2, 3, 4]], &candle_core::Device::Cpu)?)
    };
    let is_run = run().is_ok();
    drop(checkpoint);
    let _ = inventory::split_fused(lrc::model::open(&folder).unwrap());
    is_run
}

/// In every convention, one window; whether it went well.
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

fn of_recipes(_: &Bed) -> Vec<Vec<u8>> {
    let recipes = [
        "keep = 0.8\nranks = \"welore\"\nlayout = \"pivot\"\nmax-shard-size = \"1 MiB\"\ntargets = [\"*.mlp.*\"]",
        "bits = 3.5\nquant = [\"rtn-int4-g32\", \"q4_k\", \"nf4\"]\ncompensate = \"eora\"\ncalibration = \"t.txt\"\nsamples = 8\nseq-len = 64",
        "target-size = \"350MiB\"\nmethod = \"kfac\"\ncalibration = \"t\"\nsequential = true\nanchor = 0.5\ndamping-input = 0.1",
        "ranks = \"fixed:7\"\nexclude = [\"a\", \"[b-c]\"]\nformat = \"factored\"\nelastic = true\nmax-shard-size = \"1MiB\"",
    ];
    recipes.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn read_recipe(bed: &Bed, input: &[u8]) -> bool {
    let path = bed.path("recipe.toml");
    fs::write(&path, input).unwrap();
    let Ok(options) = RecipeOptions::read(&path) else { return false };
    let Ok(recipe) = Recipe::new(&options) else { return false };
    // What is accepted reads back the same.
    let full = recipe.to_options();
    let again: RecipeOptions = toml::from_str(&toml::to_string(&full).unwrap()).unwrap();
    assert_eq!(Recipe::new(&again).unwrap().to_options(), full);
    true
}

fn of_pieces(bed: &Bed) -> Vec<Vec<u8>> {
    let folder = bed.folder("journal", &[]);
    let arrays =
        vec![vec![1.5f32, -0.0].into(), Vec::<u8>::new().into(), vec![f64::NAN; 9].into(), vec![3i32, -1].into()];
    Journal::new(folder.clone()).put("piece", serde_json::json!({"n": 3, "s": ["a"]}), arrays).unwrap();
    vec![fs::read(folder.join("piece")).unwrap()]
}

fn read_piece(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("journal", &[("piece", input)]);
    let Ok(Some(piece)) = Journal::new(folder).get("piece") else { return false };
    for array in piece.rest() {
        let read = array.place.as_ref().unwrap().read().unwrap();
        assert_eq!(read.n_bytes(), array.values.n_bytes());
        let _ = array.values.f64s();
    }
    true
}

fn of_statistics(bed: &Bed) -> Vec<Vec<u8>> {
    let text = bed.text();
    let of = |family: &str| {
        let model = bed.model(family);
        let file = format!("{family}.safetensors");
        let common = ["calibrate", model.to_str().unwrap(), "--text", text.to_str().unwrap(), "-o", "OUT"];
        fs::read(bed.lrc(&file, &[&common[..], &["--samples", "2", "--seq-len", "8"]].concat())).unwrap()
    };
    vec![of("llama"), of("mixtral")]
}

fn read_statistics(bed: &Bed, input: &[u8]) -> bool {
    let path = bed.folder("statistics", &[("s.safetensors", input)]).join("s.safetensors");
    let Ok(statistics) = Statistics::open(&path) else { return false };
    let _ = (statistics.header.n_tokens(), statistics.header.n_windows());
    for part in &statistics.header.parts {
        assert_eq!(part.text_sha256.len(), 64);
    }
    // For the model that they are of, whatever they say of it.
    for family in ["llama", "mixtral"] {
        let checkpoint = lrc::model::open(&bed.path(&format!("models/{family}"))).unwrap();
        for linear in inventory::linears(&checkpoint) {
            let (Some(id), (m, n)) = (linear.id, linear.shape()) else { continue };
            let _ = statistics.input_gram(id, n);
            let _ = statistics.output_gram(id, m);
            let _ = statistics.expert_tokens(id);
            for (found, expected) in [
                (statistics.input_magnitude(id, n), n),
                (statistics.squared_gradient_input(id, n), n),
                (statistics.squared_gradient_output(id, m), m),
            ] {
                assert!(found.is_err() || found.is_ok_and(|values| values.len() == expected));
            }
        }
    }
    let copy = || ("a".to_string(), Statistics::open(&path).unwrap());
    let merged = bed.path("merged.safetensors");
    let _ = Statistics::merge(&[copy(), copy()], &merged, true);
    true
}

/// Outputs of every format, by what makes them of the fixture.
const OUTPUTS: [(&str, &str, &[&str]); 8] = [
    ("factors", "llama", &["--keep", "0.7", "--layout", "factors"]),
    ("pivots", "llama", &["--keep", "0.7"]),
    ("elastic", "llama", &["--keep", "0.7", "--elastic"]),
    ("experts", "mixtral", &["--keep", "0.7"]),
    ("codes", "llama", &["--quant", "rtn-int4-g8-asym", "--compensate", "lorc", "--compensate-rank", "2"]),
    ("split", "phi3", &["--keep", "0.7", "--fused", "split"]),
    ("gptq", "wide", &["--quant", "rtn-int4-channel", "--format", "gptq"]),
    ("compressed-tensors", "llama", &["--quant", "rtn-int8-g8", "--format", "compressed-tensors"]),
];

/// `factors/config.json`, then that file.
fn of_outputs(bed: &Bed) -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (name, family, flags) in OUTPUTS {
        let model = if family == "wide" { fixture("tiny-llama") } else { bed.model(family) };
        let common = ["compress", model.to_str().unwrap(), "-o", "OUT"];
        let folder = bed.lrc(&format!("outputs/{name}"), &[&common[..], flags].concat());
        let mut files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        for file in files
            .iter()
            .filter(|f| f.extension().is_some_and(|e| ["json", "safetensors", "arrays"].iter().any(|kind| e == *kind)))
        {
            let name = format!("{name}/{}", file.file_name().unwrap().to_str().unwrap());
            seeds.push([name.as_bytes(), b"\n", &fs::read(file).unwrap()].concat());
        }
    }
    seeds
}

fn read_output(bed: &Bed, input: &[u8]) -> bool {
    let Some((name, content)) = split_name(input) else { return false };
    let path = bed.path("outputs").join(name);
    let Ok(original) = fs::read(&path) else { return false };
    fs::write(&path, content).unwrap();
    let mut is_read = false;
    if let Ok(checkpoint) = lrc::model::open(path.parent().unwrap()) {
        is_read = inspect(&checkpoint, "m", None, &Silent).is_ok() & evaluate(bed, &checkpoint);
        let max_shard_bytes = 1 << 30;
        for keep in [0.5, 0.3] {
            let output = bed.path("shorter");
            let _ = truncate(
                &TruncateJob { checkpoint: &checkpoint, keep, output: &output, force: true, max_shard_bytes },
                &Silent,
            );
        }
        for format in [Format::Dense, Format::Factored, Format::Gguf] {
            let output = bed.path("exported");
            let _ = export(
                &ExportJob {
                    checkpoint: &checkpoint,
                    source: "m",
                    format,
                    output: &output,
                    force: true,
                    max_shard_bytes,
                },
                &Silent,
            );
        }
    }
    fs::write(&path, original).unwrap();
    is_read
}

/// `a.jsonl`, then that file.
fn of_texts(bed: &Bed) -> Vec<Vec<u8>> {
    let folder = bed.folder("chats", &[]);
    fs::write(folder.join("chat_template.jinja"), "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
        .unwrap();
    let lines = "{\"text\": \"Once upon a time\", \"n\": NaN}\n{\"text\": null}\n\"a string\"\n";
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": [{\"name\": \"f\"}]}\n";
    let array = format!("[{}, {}]", lines.lines().next().unwrap().replace("NaN", "1"), chat.trim());
    let packed = zstd::encode_all(lines.as_bytes(), 1).unwrap();
    let parquet = fs::read(fixture("text/documents.parquet")).unwrap();
    let file = |name: &str, content: &[u8]| [name.as_bytes(), b"\n", content].concat();
    vec![
        file("a.jsonl", lines.as_bytes()),
        file("b.jsonl", chat.as_bytes()),
        file("c.json", array.as_bytes()),
        file("d.txt", "Once upon a time: there was\ta dog, and\n- a cat\n".as_bytes()),
        file("e.jsonl.zst", &packed),
        file("f.parquet", &parquet),
    ]
}

fn read_text(bed: &Bed, input: &[u8]) -> bool {
    let Some((name, content)) = split_name(input) else { return false };
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '.';
    if !name.chars().all(is_plain) || !name.contains('.') || name.starts_with('.') {
        return false;
    }
    let folder = bed.folder("texts", &[(name, content)]);
    Text::read(&folder.join(name), "text", &bed.path("chats")).is_ok()
}

/// Templates that `tests/oracles/chat_templates.py` holds, where they take a plain conversation.
fn of_templates(bed: &Bed) -> Vec<Vec<u8>> {
    let chat = r#"{"messages": [{"role": "user", "content": "a 'b'"}, {"role": "assistant", "content": "c\n"}],
        "tools": [{"name": "f", "parameters": {"x": [1, 2.5, null]}}]}"#;
    bed.folder("templates", &[("chat.json", chat.as_bytes())]);
    let cases: serde_json::Value = serde_json::from_str(include_str!("../oracles/chat_templates.json")).unwrap();
    let templates = cases.as_array().unwrap().iter().filter_map(|case| case["template"].as_str());
    let all: Vec<Vec<u8>> = templates.map(|template| template.as_bytes().to_vec()).collect();
    all.into_iter().filter(|template| read_template(bed, template)).collect()
}

fn read_template(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("templates", &[("chat_template.jinja", input)]);
    Text::read(&folder.join("chat.json"), "text", &folder).is_ok()
}
