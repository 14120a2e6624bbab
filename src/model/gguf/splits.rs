//! How byte-level tokenizers split a text before they merge, by the names of llama.cpp (`tokenizer.ggml.pre`). The
//! expressions come from the published tokenizers.

use serde_json::{Value as Json, json};

/// One way to split, with what comes with it.
struct Split {
    /// Its names; the first is written.
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Texts are brought to the normal form NFC.
    is_normalized: bool,
    /// Pieces that are tokens are not merged from smaller ones.
    ignores_merges: bool,
    /// A sequence begins with BOS, if the file does not say otherwise.
    adds_bos: bool,
}

/// A step before bytes are mapped to characters.
#[derive(Clone, Copy)]
enum Step {
    /// Matches are pieces, and so is what is between them.
    Regex(&'static str),
    /// Each digit is a piece.
    Digits,
    /// GPT-2's own expression, which the mapping of bytes has built in.
    Gpt2,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

const PLAIN: Split = Split { names: &[], steps: &[], is_normalized: false, ignores_merges: false, adds_bos: false };

/// Every way to split that is known.
const SPLITS: [Split; 12] = [
    Split {
        names: &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
        ],
        steps: &[Step::Gpt2],
        ..PLAIN
    },
    Split {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        steps: &[Step::Digits, Step::Gpt2],
        ..PLAIN
    },
    Split {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        steps: &[Step::Regex(LLAMA3)],
        ignores_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    Split { names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], steps: &[Step::Regex(LLAMA3)], ..PLAIN },
    Split {
        names: &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"],
        steps: &[Step::Regex(QWEN2)],
        is_normalized: true,
        ..PLAIN
    },
    Split { names: &["stablelm2", "hunyuan", "solar-open", "grok-2"], steps: &[Step::Regex(QWEN2)], ..PLAIN },
    Split { names: &["qwen35"], steps: &[Step::Regex(QWEN35)], is_normalized: true, ..PLAIN },
    Split { names: &["tekken"], steps: &[Step::Regex(TEKKEN)], ignores_merges: true, adds_bos: true, ..PLAIN },
    Split { names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], steps: &[Step::Regex(GPT4O)], ..PLAIN },
    Split { names: &["seed-coder"], steps: &[Step::Regex(SEED)], ..PLAIN },
    Split {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        steps: &[Step::Regex(DEEPSEEK3[0]), Step::Regex(DEEPSEEK3[1]), Step::Regex(DEEPSEEK3[2])],
        ..PLAIN
    },
    Split {
        names: &["deepseek-coder"],
        steps: &[
            Step::Regex("[\r\n]"),
            Step::Regex(r"\s?\p{L}+"),
            Step::Regex(r"\s?\p{P}+"),
            Step::Regex("[一-龥ࠀ-一가-퟿]+"),
            Step::Digits,
        ],
        ..PLAIN
    },
];

/// The name in files whose writer knew none.
pub const UNNAMED: &str = "default";

/// The parts of a `tokenizer.json` that a way to split decides.
pub(super) struct SplitSteps {
    pub normalizer: Json,
    pub pre_tokenizer: Json,
    pub ignores_merges: bool,
    pub adds_bos: bool,
}

/// The way to split of this name; `None` if it is unknown.
pub(super) fn named(name: &str) -> Option<SplitSteps> {
    let split = SPLITS.iter().find(|split| split.names.contains(&name))?;
    let normalizer = if split.is_normalized { json!({"type": "NFC"}) } else { Json::Null };
    let (ignores_merges, adds_bos) = (split.ignores_merges, split.adds_bos);
    Some(SplitSteps { normalizer, pre_tokenizer: pre_tokenizer(split.steps), ignores_merges, adds_bos })
}

/// The name of the way in which a `tokenizer.json` splits; `None` if it has none.
pub fn named_as(tokenizer: &Json) -> Option<&'static str> {
    let given = expressions(&tokenizer["pre_tokenizer"])?;
    let is_same = |split: &&Split| {
        let merges_less = tokenizer["model"]["ignore_merges"].as_bool().unwrap_or(false);
        split.ignores_merges == merges_less && expressions(&pre_tokenizer(split.steps)).as_ref() == Some(&given)
    };
    // Some tokenizers have the expression of another, but merge where the other does not.
    let by_expression =
        || SPLITS.iter().find(|split| expressions(&pre_tokenizer(split.steps)).as_ref() == Some(&given));
    SPLITS.iter().find(is_same).or_else(by_expression).and_then(|split| split.names.first().copied())
}

fn pre_tokenizer(steps: &[Step]) -> Json {
    let bytes = |has_expression: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": has_expression});
    let step = |step: &Step| match step {
        Step::Regex(expression) => {
            json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false})
        }
        Step::Digits => json!({"type": "Digits", "individual_digits": true}),
        Step::Gpt2 => bytes(true),
    };
    let mut all: Vec<Json> = steps.iter().map(step).collect();
    if !steps.iter().any(|step| matches!(step, Step::Gpt2)) {
        all.push(bytes(false));
    }
    match all.as_slice() {
        [only] => only.clone(),
        _ => json!({"type": "Sequence", "pretokenizers": all}),
    }
}

/// The expressions of a pre-tokenizer in their order; `None` if a step is of another kind.
fn expressions(pre_tokenizer: &Json) -> Option<Vec<String>> {
    let one = std::slice::from_ref(pre_tokenizer);
    let steps = pre_tokenizer["pretokenizers"].as_array().map_or(one, Vec::as_slice);
    let expression = |step: &Json| match step["type"].as_str()? {
        "Split" if step["behavior"] == "Isolated" => step["pattern"]["Regex"].as_str().map(String::from),
        "Digits" if step["individual_digits"] == true => Some("digits".into()),
        "ByteLevel" if step["use_regex"] == false => Some("bytes".into()),
        "ByteLevel" => Some("gpt2".into()),
        _ => None,
    };
    steps.iter().map(expression).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_all_ways_are_found_again() {
        let mut seen: Vec<&str> = Vec::new();
        for split in &SPLITS {
            let parts = named(split.names[0]).unwrap();
            let tokenizer =
                json!({"pre_tokenizer": parts.pre_tokenizer, "model": {"ignore_merges": parts.ignores_merges}});
            let found = named_as(&tokenizer).unwrap();
            assert_eq!(expressions(&named(found).unwrap().pre_tokenizer), expressions(&parts.pre_tokenizer));
            assert_eq!(named(found).unwrap().ignores_merges, parts.ignores_merges);
            seen.extend(split.names);
            // The library of tokenizers takes it.
            let whole = json!({
                "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": parts.normalizer,
                "pre_tokenizer": parts.pre_tokenizer, "post_processor": null, "decoder": null,
                "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}
            });
            let tokenizer = tokenizers::Tokenizer::from_bytes(whole.to_string()).unwrap();
            tokenizer.encode("I'm 12345\r\n  ÀB\u{4e00}!", false).unwrap();
        }
        let n = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), n, "every name is in one place");
        assert_eq!(named_as(&json!({"pre_tokenizer": null})), None);
        assert!(named("x").is_none());
    }
}
