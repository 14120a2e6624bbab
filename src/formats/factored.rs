//! Low-rank parts stored as they are: a Hugging Face repository with its own small modeling file.
//!
//! A module `X` is stored as the parts of its structure, which the files of `operator/` document: matrices of floats
//! as `X.PART.weight`, indices as i32 without `.weight`. Its bias belongs to the part that the structure names, or
//! stays `X.bias`. The `model_type` gets the prefix `lrc_`: under the native one, a user who forgets
//! `trust_remote_code` would get random weights and no error.
//!
//! A base under factors is `X.base`. A quantized matrix `P.weight` (`X`, `X.base` or one of the parts) is stored as
//! `P.codes` u8, rows of packed codes with low bits first, `P.scales` f16 (out, n_groups), and `P.zeros` if groups have
//! their own.

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::exporter::{Adapter, Exporter, Holds, NamedBytes, OutTensor, Source, encode, stacks_apart};
use super::mlx;
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, FORMAT_VERSION};
use crate::codecs::packed::{self, PackedEntry};
use crate::codecs::{Values, Written};
use crate::model::ModelConfig;
use crate::model::config::MODEL_TYPE_PREFIX;
use crate::model::inventory::{self, LinearInfo, Stored};
use crate::operator::{self, BASE, Element, Form, Forms, Kind, Matrix, Operator, Part, Right, Term};
use crate::quantize::{Quantized, Storage};

pub(super) struct Factored;

pub(super) const MODELING_FILE: &str = "modeling_lrc.py";
/// The layers, and how they take their places in a model: one file in the output.
const MODELING_TEMPLATE: &str = concat!(include_str!("modeling_lrc.py"), "\n\n", include_str!("modeling_lrc_model.py"));

/// The transformers class that the output extends, and its own class: `LlamaForCausalLM`, `LrcForCausalLM`.
struct Classes {
    base: String,
    own: String,
}

impl Classes {
    fn of(source: &Map<String, Value>) -> Option<Self> {
        let base = source.get("architectures")?.get(0)?.as_str()?.to_string();
        let is_name = base.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        // GPT-2 and other early models have `GPT2LMHeadModel` instead of `...ForCausalLM`.
        let head = match base.find("For") {
            Some(at) => &base[at..],
            None if base.ends_with("LMHeadModel") => "ForCausalLM",
            None => "",
        };
        is_name.then(|| Self { own: format!("Lrc{head}"), base: base.clone() })
    }

    /// The auto class for the head of the model, such as `AutoModelForCausalLM`.
    fn auto_class(&self, config: &Map<String, Value>) -> String {
        match self.own.as_str() {
            // Models that generate from more than text have no auto class named after their own class.
            "LrcForConditionalGeneration" if config.contains_key("vision_config") => {
                "AutoModelForImageTextToText".into()
            }
            "LrcForConditionalGeneration" => "AutoModelForSeq2SeqLM".into(),
            own => own.replacen("Lrc", "AutoModel", 1),
        }
    }
}

/// The auto class of transformers that loads a model with `config`.
pub(super) fn auto_class(config: &Map<String, Value>) -> String {
    let of_head = Classes::of(config).map(|classes| classes.auto_class(config));
    of_head.unwrap_or_else(|| "AutoModelForCausalLM".into())
}

/// The modules that are stored as split parts, with the names of the parts and whether their rows alternate head by
/// head.
fn split(source: &Source<'_>) -> Map<String, Value> {
    let Ok((config, architecture)) = ModelConfig::of(source.checkpoint) else { return Map::new() };
    let mut split: Map<String, Value> = Map::new();
    for linear in inventory::linears(source.checkpoint) {
        let Some(id) = linear.id.filter(|id| id.slot.expert.is_none()) else { continue };
        let Some((_, _, part)) = architecture.whole(id.slot.role) else { continue };
        let whole = linear.module.strip_suffix(&format!(".{part}")).unwrap_or(&linear.module);
        let rows = architecture.rows_of(id.slot.role, &config.widths(id.block));
        let run = rows.filter(|rows| rows.stride > 0);
        let entry = split.entry(whole).or_insert_with(|| json!({"parts": {}, "run": run.map(|rows| rows.run)}));
        entry["parts"][part] = json!(linear.out_features);
    }
    split
}

/// The linears of blocks with widths of their own, with their shapes (out, in): classes of transformers know one width
/// for all blocks.
fn shapes(source: &Source<'_>) -> Map<String, Value> {
    let Ok((config, _)) = ModelConfig::of(source.checkpoint) else { return Map::new() };
    let common = *config.block_widths().common();
    let is_own = |linear: &LinearInfo| {
        let id = linear.id.filter(|id| id.slot.expert.is_none());
        id.is_some_and(|id| common.shape(id.slot).0 != config.widths(id.block).shape(id.slot).0)
    };
    let linears = inventory::linears(source.checkpoint).into_iter().filter(is_own);
    linears.map(|linear| (linear.module.clone(), json!([linear.out_features, linear.in_features]))).collect()
}

/// The stored matrices of a module by name, base first, with the form that each belongs to.
pub(super) fn parts(linear: &LinearInfo, forms: &Forms) -> Vec<(String, Part, Form)> {
    let of = |form: Form| {
        let name = move |part: Part| match (form.kind == Kind::DENSE, forms.over) {
            (true, None) => linear.module.clone(),
            (true, Some(_)) => part_name(linear, BASE),
            (false, _) => part_name(linear, part.suffix),
        };
        form.own_parts(linear.shape()).into_iter().map(move |part| (name(part), part, form))
    };
    forms.iter().flat_map(of).collect()
}

fn part_name(linear: &LinearInfo, part: &str) -> String {
    format!("{}.{part}", linear.module)
}

impl Exporter for Factored {
    fn holds(&self) -> Holds {
        Holds::Operators
    }

    fn refusal(&self, _: &Source<'_>, _: &LinearInfo, forms: &Forms) -> Option<String> {
        match (forms.base.and_then(|base| base.storage), forms.over) {
            (Some(Storage::Block(block_type)), _) => {
                Some(format!("`{}` is a block type of llama.cpp", block_type.name))
            }
            (_, Some(form)) if forms.base.is_some() && !form.kind.structure().takes_base() => {
                Some(format!("the layout `{}` cannot be combined with a base, which takes factors", form.kind))
            }
            _ => None,
        }
    }

    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor> {
        let mut tensors = Vec::new();
        for (name, part, form) in parts(linear, forms) {
            let [rows, cols] = part.shape;
            match (part.element, form.scheme()) {
                (Element::Index, _) => tensors.push(OutTensor::plain(name, Dtype::I32, vec![rows])),
                (Element::Float, None) => {
                    tensors.push(OutTensor::plain(format!("{name}.weight"), linear.dtype, vec![rows, cols]));
                }
                (Element::Float, Some(scheme)) => {
                    tensors.extend(packed::tensors(scheme, [rows, cols]).into_iter().map(|packed| {
                        OutTensor::plain(format!("{name}.{}", packed.suffix), packed.dtype, packed.shape)
                    }));
                }
            }
        }
        tensors
    }

    fn bytes(
        &self,
        _: &Source<'_>,
        linear: &LinearInfo,
        operator: &Operator,
    ) -> Result<Vec<NamedBytes>, CheckpointError> {
        let mut tensors = Vec::new();
        let names = parts(linear, &operator.forms()).into_iter().map(|(name, ..)| name);
        for (name, matrix) in names.zip(operator.terms().flat_map(Term::own_parts)) {
            match matrix {
                Matrix::Float(values) => tensors.push(encode(format!("{name}.weight"), linear.dtype, values)?),
                Matrix::Indices(indices) => {
                    let bytes = indices.iter().flat_map(|index| index.to_le_bytes()).collect();
                    tensors.push(NamedBytes::of(name, bytes));
                }
                Matrix::Quantized(Quantized::Grouped(matrix)) => {
                    for Written { suffix, dtype, values } in packed::write(matrix) {
                        let name = format!("{name}.{suffix}");
                        tensors.push(match values {
                            Values::Bytes(bytes) => NamedBytes::of(name, bytes),
                            Values::Floats(floats) => encode(name, dtype, &floats)?,
                        });
                    }
                }
                Matrix::Quantized(Quantized::Block(_)) => unreachable!("invariant: blocks are refused"),
            }
        }
        Ok(tensors)
    }

    fn bias_name(&self, linear: &LinearInfo, forms: &Forms) -> String {
        match forms.bias_part() {
            Some(part) => format!("{}.bias", part_name(linear, part)),
            None => format!("{}.bias", linear.module),
        }
    }

    fn config(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Map<String, Value> {
        let mut config = source.config.clone();
        let besides = besides(source, modules);
        if modules.is_empty() && besides.is_empty() {
            return config;
        }
        let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("unknown").to_string();
        config.insert("model_type".into(), json!(format!("{MODEL_TYPE_PREFIX}{model_type}")));
        // Without a class to extend, transformers cannot load the output; lrc can.
        if let Some(classes) = Classes::of(&source.config) {
            let mut auto_map = Map::new();
            auto_map.insert("AutoConfig".into(), json!("modeling_lrc.LrcConfig"));
            auto_map.insert("AutoModel".into(), json!("modeling_lrc.LrcModel"));
            if classes.own != "Lrc" {
                auto_map.insert(classes.auto_class(&source.config), json!(format!("modeling_lrc.{}", classes.own)));
                config.insert("architectures".into(), json!([classes.own]));
            } else {
                config.insert("architectures".into(), json!(["LrcModel"]));
            }
            config.insert("auto_map".into(), Value::Object(auto_map));
            if mlx::modeling(&source.config).is_some() {
                config.insert("model_file".into(), json!(mlx::FILE));
            }
        }
        let (mut entries, mut quantized) = (Map::new(), Map::new());
        for (linear, forms) in modules {
            entries.insert(linear.module.clone(), Value::Object(described(forms)));
            for (name, Part { element, shape, .. }, form) in parts(linear, forms) {
                let Some(scheme) = form.scheme().filter(|_| element == Element::Float) else { continue };
                quantized.insert(name, json!(PackedEntry::new(scheme, shape, linear.dtype)));
            }
        }
        let mut lrc = Map::new();
        lrc.insert("version".into(), json!(FORMAT_VERSION));
        // The classes of the source, so that the output can be exported again.
        if let Some(classes) = source.config.get("architectures") {
            lrc.insert("architectures".into(), classes.clone());
        }
        lrc.insert("modules".into(), Value::Object(entries));
        lrc.extend(besides);
        if !quantized.is_empty() {
            lrc.insert("quantized".into(), Value::Object(quantized));
        }
        config.insert("lrc".into(), Value::Object(lrc));
        config
    }

    fn side_files(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        if modules.is_empty() && besides(source, modules).is_empty() {
            return Vec::new();
        }
        let Some(classes) = Classes::of(&source.config) else { return Vec::new() };
        let own = if classes.own == "Lrc" { "LrcHeadless" } else { &classes.own };
        let code = MODELING_TEMPLATE.replace("@BASE@", &classes.base).replace("LrcForCausalLM", own);
        let of_mlx = mlx::modeling(&source.config).map(|code| (mlx::FILE.into(), code));
        [(MODELING_FILE.into(), code)].into_iter().chain(of_mlx).collect()
    }

    fn loading(&self, _: Adapter) -> String {
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\
         model = AutoModelForCausalLM.from_pretrained(\"FOLDER\", trust_remote_code=True)\n\
         tokenizer = AutoTokenizer.from_pretrained(\"FOLDER\", trust_remote_code=True)\n```\n\n\
         The modeling code is `modeling_lrc.py` in this folder. `lrc eval FOLDER --text FILE` runs it without Python.\n"
            .into()
    }
}

/// The entries of `lrc` that describe the model besides its compressed modules.
fn besides(source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Map<String, Value> {
    let stacks = stacks_apart(source, modules).into_iter();
    let stacks: Map<String, Value> = stacks.map(|stack| (stack.tensor.clone(), json!(stack.shape))).collect();
    let entries =
        [("split", split(source)), ("stacks", stacks), ("shared", shared(modules)), ("shapes", shapes(source))];
    let entries = entries.into_iter().filter(|(_, listed)| !listed.is_empty());
    entries.map(|(key, listed)| (key.into(), Value::Object(listed))).collect()
}

/// The tensors that a module borrows, with the names of their owners.
fn shared(modules: &[(LinearInfo, Forms)]) -> Map<String, Value> {
    let right = |forms: &Forms| forms.over.map(|form| form.right);
    let mut shared = Map::new();
    for (linear, forms) in modules {
        let (Some(over), Some(Right::Borrowed(unit))) = (forms.over, right(forms)) else { continue };
        let lender = modules.iter().find(|(_, other)| right(other) == Some(Right::Lent(unit)));
        let (lender, _) = lender.expect("invariant: what is borrowed is lent");
        let (suffix, element) = over.kind.structure().suffixes()[0];
        let name = |linear: &LinearInfo| format!("{}.{}", linear.module, operator::part_name(suffix, element));
        shared.insert(name(linear), json!(name(lender)));
    }
    shared
}

/// The entry of a module in `config.json`.
fn described(forms: &Forms) -> Map<String, Value> {
    let mut described = Map::new();
    if forms.base.is_some() {
        described.insert("base".into(), json!(true));
    }
    if let Some(form) = forms.over {
        described.extend(form.config_entry());
    }
    described
}

/// The stored forms of a linear in a compressed checkpoint, from headers alone; `None` if it is plain.
///
/// # Errors
/// A tensor is absent or broken.
pub fn stored_forms(checkpoint: &Checkpoint, linear: &LinearInfo) -> Result<Option<Forms>> {
    let storage = |name: &str| -> Result<Option<Storage>> {
        let storage = checkpoint.storage(name)?;
        // Blocks that other formats also have are read as groups, as in [`load`].
        Ok(storage.map(|storage| match storage {
            Storage::Block(block_type) => block_type.as_scheme().map_or(storage, Storage::Grouped),
            Storage::Grouped(_) => storage,
        }))
    };
    let Stored::Structured { kind, size, has_base } = linear.stored else {
        let base = storage(&linear.weight_name())?;
        return Ok(base.map(|base| Forms { base: Some(Forms::base(Some(base))), over: None }));
    };
    let base = match has_base {
        true => Some(Forms::base(storage(&linear.base_name())?)),
        false => None,
    };
    let (suffix, _) = kind.structure().suffixes()[0];
    let codes = storage(&format!("{}.{}", linear.module, operator::part_name(suffix, Element::Float)))?;
    Ok(Some(Forms { base, over: Some(Form { kind, size, storage: codes, right: Right::Own }) }))
}

/// The operator of a linear in a compressed checkpoint, with its codes; `None` if the linear is plain.
///
/// # Errors
/// A tensor is absent or broken.
pub fn load(checkpoint: &Checkpoint, linear: &LinearInfo) -> Result<Option<Operator>> {
    let quantized = |name: &str| -> Result<Option<Quantized>> {
        Ok(checkpoint.quantized(name)?.map(|matrix| match matrix {
            // Blocks that another codec can also express become groups.
            Quantized::Block(blocks) => {
                let grouped = blocks.to_grouped().map(Quantized::Grouped);
                grouped.unwrap_or(Quantized::Block(blocks))
            }
            Quantized::Grouped(_) => matrix,
        }))
    };
    let base = |matrix: Quantized| {
        let storage = Some(matrix.storage());
        Term::base(Matrix::Quantized(matrix), storage)
    };
    let Stored::Structured { has_base, .. } = linear.stored else {
        return Ok(quantized(&linear.weight_name())?.map(|matrix| Operator { base: Some(base(matrix)), over: None }));
    };
    let mut over = inventory::term(checkpoint, linear)?;
    for (&(suffix, element), part) in over.form.kind.structure().suffixes().iter().zip(&mut over.parts) {
        if element == Element::Index {
            continue;
        }
        if let Some(codes) = quantized(&format!("{}.weight", part_name(linear, suffix)))? {
            over.form.storage = Some(codes.storage());
            *part = Matrix::Quantized(codes);
        }
    }
    let base = match has_base {
        false => None,
        true => Some(match quantized(&linear.base_name())? {
            Some(codes) => base(codes),
            None => Term::base(Matrix::Float(inventory::base_values(checkpoint, linear)?), None),
        }),
    };
    Ok(Some(Operator { base, over: Some(over) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::quantize::{Levels, Scheme};

    fn config(class: &str) -> Map<String, Value> {
        json!({"architectures": [class], "model_type": "llama", "keep": {"b": 1, "a": 2}}).as_object().unwrap().clone()
    }

    fn fixture() -> Checkpoint {
        Checkpoint::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama")).unwrap()
    }

    #[test]
    fn the_config_keeps_every_other_key_and_gets_the_safety_catch() {
        let checkpoint = fixture();
        let source = Source { checkpoint: &checkpoint, config: config("LlamaForCausalLM") };
        let mut linears = inventory::linears(&checkpoint).into_iter().filter(|l| l.is_default_target);
        let (first, second) = (linears.next().unwrap(), linears.next().unwrap());
        let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: false }, group: Some(32) };
        let over = Forms::of_rank(Kind::FACTORS, 5, second.shape());
        let quantized = Forms { base: Some(Forms::base(Some(Storage::Grouped(scheme)))), ..over };
        let pivots = Forms::of_rank("pivot".parse().unwrap(), 3, first.shape());
        let modules = [(first.clone(), pivots), (second.clone(), quantized)];
        let written = Factored.config(&source, &modules);
        assert_eq!(written["model_type"], "lrc_llama");
        assert_eq!(written["architectures"], json!(["LrcForCausalLM"]));
        assert_eq!(written["auto_map"]["AutoModelForCausalLM"], "modeling_lrc.LrcForCausalLM");
        assert_eq!(written["lrc"]["modules"][&first.module], json!({"rank": 3, "layout": "pivot"}));
        assert_eq!(written["lrc"]["modules"][&second.module], json!({"base": true, "rank": 5, "layout": "factors"}));
        let codes = &written["lrc"]["quantized"][format!("{}.base", second.module)];
        let shape = json!([second.out_features, second.in_features]);
        assert_eq!(codes, &json!({"scheme": "int4-g32-asym", "shape": shape, "dtype": "F32"}));
        assert_eq!(written["keep"], json!({"b": 1, "a": 2}));
        assert_eq!(written["model_file"], "modeling_lrc_mlx.py");
        let files = Factored.side_files(&source, &modules);
        assert!(files.len() == 2 && files[1].1.contains("_TYPE = \"llama\""));
        // If nothing is compressed, the source's config loads unchanged. Whatever was added is removed again.
        assert_eq!(Factored.config(&source, &[]), source.config);
        assert_eq!(crate::model::config::native_config(&written), source.config);
    }

    #[test]
    fn other_heads_have_their_own_auto_class() {
        let check = |class: &str, more: Value, own: &str, auto: &str| {
            let mut config = config(class);
            config.extend(more.as_object().unwrap().clone());
            let classes = Classes::of(&config).unwrap();
            assert_eq!((classes.base.as_str(), classes.own.as_str()), (class, own));
            assert_eq!(classes.auto_class(&config), auto);
        };
        check("BertForMaskedLM", json!({}), "LrcForMaskedLM", "AutoModelForMaskedLM");
        check("GPT2LMHeadModel", json!({}), "LrcForCausalLM", "AutoModelForCausalLM");
        let (class, own) = ("T5ForConditionalGeneration", "LrcForConditionalGeneration");
        check(class, json!({}), own, "AutoModelForSeq2SeqLM");
        check(class, json!({"vision_config": {}}), own, "AutoModelForImageTextToText");
        let checkpoint = fixture();
        let source = Source { checkpoint: &checkpoint, config: config("BertForMaskedLM") };
        let first = inventory::linears(&checkpoint).into_iter().find(|linear| linear.is_default_target).unwrap();
        let modules = [(first.clone(), Forms::of_rank(Kind::FACTORS, 3, first.shape()))];
        assert!(Factored.side_files(&source, &[]).is_empty());
        // mlx-lm has causal models only.
        let [(_, file)] = &Factored.side_files(&source, &modules)[..] else { panic!("one file") };
        assert!(file.contains("class LrcForMaskedLM(") && file.contains("\"BertForMaskedLM\""));
        assert!(Classes::of(&config("x\"); import os")).is_none());
    }
}
