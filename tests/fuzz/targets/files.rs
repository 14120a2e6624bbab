//! Files that lrc writes and reads again: recipes, journals, statistics, outputs.

use std::fs;
use std::path::PathBuf;

use lrc::calibrate::Statistics;
use lrc::checkpoint::Existing;
use lrc::compress::recipe::{Recipe, RecipeOptions};
use lrc::export::{ExportJob, export};
use lrc::formats::Format;
use lrc::inspect::inspect;
use lrc::model::inventory;
use lrc::progress::Silent;
use lrc::store::{Array, Journal};
use lrc::truncate::{TruncateJob, truncate};

use super::{Bed, evaluate, fixture, split_name};

pub(super) fn of_recipes(_: &Bed) -> Vec<Vec<u8>> {
    let recipes = [
        "keep = 0.8\nranks = \"welore\"\nlayout = \"pivot\"\nmax-shard-size = \"1 MiB\"\ntargets = [\"*.mlp.*\"]",
        "bits = 3.5\nquant = [\"rtn-int4-g32\", \"q4_k\", \"nf4\"]\ncompensate = \"eora\"\ncalibration = \"t.txt\"\nsamples = 8\nseq-len = 64",
        "target-size = \"350MiB\"\nmethod = \"kfac\"\ncalibration = \"t\"\nsequential = true\nanchor = 0.5\ndamping-input = 0.1",
        "ranks = \"fixed:7\"\nexclude = [\"a\", \"[b-c]\"]\nformat = \"factored\"\nelastic = true\nmax-shard-size = \"1MiB\"",
    ];
    recipes.iter().map(|text| text.as_bytes().to_vec()).collect()
}

pub(super) fn read_recipe(bed: &Bed, input: &[u8]) -> bool {
    let path = bed.path("recipe.toml");
    fs::write(&path, input).unwrap();
    let Ok(options) = RecipeOptions::read(&path) else { return false };
    let Ok(recipe) = Recipe::new(&options) else { return false };
    // An accepted recipe is read back unchanged.
    let full = recipe.to_options();
    let again: RecipeOptions = toml::from_str(&toml::to_string(&full).unwrap()).unwrap();
    assert_eq!(Recipe::new(&again).unwrap().to_options(), full);
    true
}

pub(super) fn of_pieces(bed: &Bed) -> Vec<Vec<u8>> {
    let folder = bed.folder("journal", &[]);
    let arrays =
        vec![vec![1.5f32, -0.0].into(), Vec::<u8>::new().into(), vec![f64::NAN; 9].into(), vec![3i32, -1].into()];
    Journal::new(folder.clone()).put("piece", serde_json::json!({"n": 3, "s": ["a"]}), arrays).unwrap();
    vec![fs::read(folder.join("piece")).unwrap()]
}

pub(super) fn read_piece(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("journal", &[("piece", input)]);
    // As the piece of another run, whose arrays are read when they are needed.
    if let Ok(Some(piece)) = Journal::default().with_pieces_of(std::slice::from_ref(&folder)).unwrap().unread("piece") {
        piece.rest().into_iter().for_each(|array| drop(array.read()));
    }
    let Ok(Some(piece)) = Journal::new(folder).get("piece") else { return false };
    for array in piece.rest() {
        let Array::Kept(values, place) = array else { panic!("it is in the journal") };
        assert_eq!(place.read().unwrap().n_bytes(), values.n_bytes());
        let _ = values.f64s();
    }
    true
}

pub(super) fn of_statistics(bed: &Bed) -> Vec<Vec<u8>> {
    let text = bed.text();
    let of = |family: &str| {
        let model = bed.model(family);
        let file = format!("{family}.safetensors");
        let common = ["calibrate", model.to_str().unwrap(), "--text", text.to_str().unwrap(), "-o", "OUT"];
        fs::read(bed.lrc(&file, &[&common[..], &["--samples", "2", "--seq-len", "8"]].concat())).unwrap()
    };
    vec![of("llama"), of("mixtral")]
}

pub(super) fn read_statistics(bed: &Bed, input: &[u8]) -> bool {
    let path = bed.folder("statistics", &[("s.safetensors", input)]).join("s.safetensors");
    let Ok(statistics) = Statistics::open(&path) else { return false };
    let _ = (statistics.header.n_tokens(), statistics.header.n_windows());
    for part in &statistics.header.texts {
        assert_eq!(part.text_sha256.len(), 64);
    }
    // Checked against the model of the statistics, whatever their header says.
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
    let _ = Statistics::merge(&[copy(), copy()], &merged, Existing::Replace);
    true
}

/// Outputs of the fixture in every format, by the flags that make them.
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
pub(super) fn of_outputs(bed: &Bed) -> Vec<Vec<u8>> {
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

pub(super) fn read_output(bed: &Bed, input: &[u8]) -> bool {
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
                &TruncateJob {
                    checkpoint: &checkpoint,
                    keep,
                    output: &output,
                    existing: Existing::Replace,
                    max_shard_bytes,
                },
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
                    existing: Existing::Replace,
                    max_shard_bytes,
                },
                &Silent,
            );
        }
    }
    fs::write(&path, original).unwrap();
    is_read
}
