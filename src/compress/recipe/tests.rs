use std::num::NonZeroUsize;
use std::path::PathBuf;

use bytesize::ByteSize;

use super::*;
use crate::compress::allocate::Ranks;
use crate::compress::compensate::{Compensate, CompensateRank};
use crate::compress::presets::Method;
use crate::compress::scale::{DepthWeight, Sensitivity};
use crate::formats::Format;
use crate::operator::Kind;
use crate::quantize::Quant;

fn check(options: RecipeOptions, expected: &str) {
    let error = Recipe::new(&options).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn contradictions_are_usage_errors() {
    let keep = |keep: f64| RecipeOptions { keep: Some(keep), ..Default::default() };
    check(RecipeOptions::default(), "is missing");
    check(keep(0.0), "outside (0, 1]");
    check(keep(f64::NAN), "outside (0, 1]");
    check(RecipeOptions { ranks: Some(Ranks::Fixed(8)), ..keep(0.5) }, "cannot be combined");
    check(RecipeOptions { target_size: Some(ByteSize(9)), ..keep(0.5) }, "cannot be combined");
    check(
        RecipeOptions { target_size: Some(ByteSize(9)), format: Some(Format::Dense), ..Default::default() },
        "full-size weights",
    );
    check(RecipeOptions { anchor: Some(0.5), ..keep(0.5) }, "no effect without `--sequential`");
    check(RecipeOptions { sequential: Some(true), ..keep(0.5) }, "`--sequential` needs `--calibration FILE`");
    check(
        RecipeOptions { sensitivity: Some(Sensitivity::Energy), ..keep(0.5) },
        "no effect without `--ranks knapsack`",
    );
    check(RecipeOptions { depth_weight: Some(DepthWeight::Auto), ..keep(0.5) }, "no effect without `--ranks knapsack`");
    check(RecipeOptions { damping_input: Some(0.1), ..keep(0.5) }, "no Gram of inputs");
    check(RecipeOptions { clip_gradients: Some(true), ..keep(0.5) }, "no Gram of gradients");
    check(
        RecipeOptions { elastic: Some(true), layout: Some(Kind::FACTORS), ..keep(0.5) },
        "`--elastic` has no effect with `--layout factors`",
    );
    check(RecipeOptions { rank_multiple: Some(0), ..keep(0.5) }, "at least 1");
    check(RecipeOptions { rank_floor: Some(1.5), ..keep(0.5) }, "outside [0, 1]");
    let statistics = Some(PathBuf::from("s"));
    check(
        RecipeOptions { statistics: statistics.clone(), method: Some(Method::Svd), ..keep(0.5) },
        "nothing in it uses activations",
    );
    let unused = RecipeOptions { statistics, calibration: Some("t".into()), sequential: Some(false), ..keep(0.5) };
    check(unused, "`--calibration` has no effect");
    check(RecipeOptions { method: Some(Method::SvdLlm), ..keep(0.5) }, "`--method svd-llm` needs `--calibration FILE`");
    check(RecipeOptions { samples: Some(8), ..keep(0.5) }, "no effect without `--calibration FILE`");
    let text = Some(PathBuf::from("t"));
    check(
        RecipeOptions { method: Some(Method::Svd), calibration: text.clone(), ..keep(0.5) },
        "`--calibration` has no effect",
    );
    for seq_len in [0, 1] {
        let short = RecipeOptions { seq_len: Some(seq_len), calibration: text.clone(), ..keep(0.5) };
        check(short, "is too short");
    }
    check(RecipeOptions { samples: Some(0), calibration: text.clone(), ..keep(0.5) }, "at least 1");
    let few = RecipeOptions { samples: Some(4), gradient_samples: Some(5), calibration: text, ..keep(0.5) };
    check(few, "more than the 4 windows of `--samples`");
    check(RecipeOptions { field: Some("x".into()), ..keep(0.5) }, "`--field` has no effect without");
    let quant = || RecipeOptions { quant: vec!["rtn-int4".parse().unwrap()], ..Default::default() };
    let weighed = RecipeOptions { sensitivity: Some(Sensitivity::Energy), ..quant() };
    check(weighed, "`--sensitivity` has no effect on one quantizer");
    let weighed = RecipeOptions { depth_weight: Some(DepthWeight::Fixed(0.5)), ..quant() };
    check(weighed, "`--depth-weight` has no effect on one quantizer");
    check(RecipeOptions { bits: Some(4.0), sensitivity: Some(Sensitivity::Measured), ..quant() }, "cannot be combined");
    assert_eq!(Quantizers::new(Vec::new()), None);
    check(RecipeOptions { targets: vec!["[".into()], ..keep(0.5) }, "not a glob");
}

/// The quantizer of an integer type without a method is the best one that the data allow; a named one stays.
#[test]
fn quantizers_without_a_method_get_the_one_that_the_data_allow() {
    let resolved = |options: RecipeOptions| -> Vec<String> {
        let recipe = Recipe::new(&RecipeOptions { bits: Some(4.5), ..options }).unwrap();
        recipe.quant().iter().map(ToString::to_string).collect()
    };
    let quant: Vec<Quant> =
        ["int4-g64", "rtn-int3", "int8", "int3-2of4", "int8-2of4", "nf4"].map(|name| name.parse().unwrap()).to_vec();
    let with =
        |calibration, statistics| RecipeOptions { quant: quant.clone(), calibration, statistics, ..Default::default() };
    let rounded =
        ["rtn-int4-g64", "rtn-int3-g128", "rtn-int8-g128", "rtn-int3-g128-2of4", "rtn-int8-g128-2of4", "nf4-g64"];
    let descended =
        ["cd-int4-g64", "rtn-int3-g128", "rtn-int8-g128", "cd-int3-g128-2of4", "cd-int8-g128-2of4", "nf4-g64"];
    assert_eq!(resolved(with(None, None)), rounded);
    assert_eq!(resolved(with(Some("t".into()), None)), descended);
    assert_eq!(resolved(with(None, Some("s".into()))), descended);
}

/// Errors name the flags that were given and no others, and hints lead to a recipe that is accepted.
#[test]
fn errors_name_what_was_given() {
    for (text, expected, hint) in [
        ("ranks = \"full\"\nrank-floor = 0.1", "`--rank-floor` has no effect with `--ranks full`", "remove it"),
        (
            "ranks = \"fixed:8\"\nrank-multiple = 8",
            "`--rank-multiple` has no effect with `--ranks fixed:8`",
            "remove it",
        ),
        (
            "keep = 0.5\nranks = \"knapsack\"\nsensitivity = \"measured\"\ndepth-weight = \"auto\"",
            "`--sensitivity measured` and `--depth-weight auto` need `--calibration FILE`",
            "`--statistics` cannot replace",
        ),
        (
            "quant = [\"gptq-int4\"]\ncompensate = \"eora\"\ncompensate-rank = \"8\"",
            "`--compensate eora` and `--quant gptq-int4-g128` need `--calibration FILE` or `--statistics FILE`",
            "needs no text",
        ),
        (
            "keep = 0.5\nmethod = \"kfac\"\nstatistics = \"s\"\ncalibration = \"t\"\nsequential = false",
            "`--calibration` has no effect with `--statistics` in this recipe",
            "remove one of the two",
        ),
        ("keep = 0.5\nfield = \"x\"", "`--field` has no effect without", "names the field"),
        ("bits = 3\nkeep = 0.5", "`--bits` cannot be combined with `--keep`", "remove one"),
        ("bits = 3\ntarget-size = \"1 MB\"", "`--bits` cannot be combined with `--target-size`", "remove one"),
        (
            "quant = [\"rtn-int4\"]\ncompensate = \"lorc\"\ncompensate-rank = \"auto\"",
            "`--compensate-rank auto` needs a budget",
            "`--compensate-rank 16`",
        ),
        ("quant = [\"rtn-int4\"]\ncompensate = \"lorc\"", "`--compensate` needs `--compensate-rank`", "`--bits 3.5`"),
    ] {
        let error = Recipe::new(&toml::from_str(text).unwrap()).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{text}: {error}");
        let failure: &crate::error::Failure = error.downcast_ref().unwrap();
        assert!(failure.hint.as_deref().is_some_and(|found| found.contains(hint)), "{text}: {:?}", failure.hint);
    }
}

#[test]
fn flags_win_over_the_file() {
    let file: RecipeOptions = toml::from_str("keep = 0.5\nranks = \"welore\"\nmax-shard-size = \"1 MiB\"").unwrap();
    let flags = RecipeOptions { keep: Some(0.9), ..Default::default() };
    let recipe = Recipe::new(&flags.or(file)).unwrap();
    let found = (recipe.budget(), recipe.ranks(), recipe.max_shard_bytes);
    assert_eq!(found, (Budget::Keep(0.9), Ranks::Welore, 1 << 20));
    assert!(toml::from_str::<RecipeOptions>("kep = 0.5").is_err());
    for written in ["\"1.5K\"", "\"1.5k\"", "1500", "\"1500\""] {
        let file: RecipeOptions = toml::from_str(&format!("params = {written}")).unwrap();
        assert_eq!(file.params, Some(Parameters(1500)), "{written}");
        assert_eq!(toml::from_str::<RecipeOptions>(&toml::to_string(&file).unwrap()).unwrap(), file);
        assert!(Recipe::new(&file).unwrap_err().to_string().contains("`--params`"));
        assert_eq!(RecipeOptions { bits: Some(3.0), ..Default::default() }.or(file).params, None);
    }
}

#[test]
fn a_written_recipe_reads_back_the_same() {
    let plain = RecipeOptions { keep: Some(0.7), ..Default::default() };
    let calibrated = RecipeOptions {
        target_size: Some(ByteSize(1_000_001)),
        calibration: Some("text.txt".into()),
        targets: vec!["*.mlp.*".into()],
        max_shard_size: Some(ByteSize(123_456_789)),
        sequential: Some(true),
        depth_weight: Some(DepthWeight::Auto),
        ..Default::default()
    };
    let full = RecipeOptions { ranks: Some(Ranks::Fixed(7)), ..Default::default() };
    for options in [plain, calibrated, full] {
        let full = Recipe::new(&options).unwrap().to_options();
        let again: RecipeOptions = toml::from_str(&toml::to_string(&full).unwrap()).unwrap();
        assert_eq!(again, full);
        assert_eq!(Recipe::new(&again).unwrap().to_options(), full);
    }
}

#[test]
fn recipes_are_written_in_full_and_in_one_order() {
    for (options, expected) in [
        (
            "ranks = \"uniform\"\nkeep = 0.7",
            "keep = 0.7\nmethod = \"svd\"\nranks = \"uniform\"\nlayout = \"pivot\"\nrank-floor = 0.0\nrank-multiple = 1\n\
             format = \"factored\"\nsequential = false\nmax-shard-size = \"4000000000 B\"\n",
        ),
        (
            "quant-factors = \"int8\"\ncompensate = \"lorc\"\nbits = 5\nquant = [\"rtn-int4-g32\", \"rtn-int8-g32\"]",
            "bits = 5.0\nquant = [\"rtn-int4-g32\", \"rtn-int8-g32\"]\ncompensate = \"lorc\"\ncompensate-rank = \"auto\"\n\
             quant-factors = \"int8\"\nmethod = \"svd\"\nranks = \"knapsack\"\nlayout = \"factors\"\nsensitivity = \"energy\"\n\
             depth-weight = \"0\"\nformat = \"factored\"\nsequential = false\nmax-shard-size = \"4000000000 B\"\n",
        ),
        (
            "equal-bytes-baseline = false\nquant = [\"rtn-int4-g32\"]\ncompensate = \"lorc\"\ncompensate-rank = \"4\"",
            "quant = [\"rtn-int4-g32\"]\ncompensate = \"lorc\"\ncompensate-rank = \"4\"\nequal-bytes-baseline = false\n\
             method = \"svd\"\nranks = \"knapsack\"\nlayout = \"factors\"\nformat = \"factored\"\nsequential = false\n\
             max-shard-size = \"4000000000 B\"\n",
        ),
        (
            "quant = [\"rtn-int4-g32\"]",
            "quant = [\"rtn-int4-g32\"]\ncompensate = \"none\"\nmethod = \"svd\"\nranks = \"knapsack\"\n\
             format = \"factored\"\nsequential = false\nmax-shard-size = \"4000000000 B\"\n",
        ),
    ] {
        let options: RecipeOptions = toml::from_str(options).unwrap();
        assert_eq!(toml::to_string(&Recipe::new(&options).unwrap().to_options()).unwrap(), expected);
    }
}

#[test]
fn settings_are_neutral_where_the_approach_has_none() {
    let recipe = |text: &str| Recipe::new(&toml::from_str(text).unwrap()).unwrap();
    let fixed = recipe("ranks = \"fixed:8\"");
    assert_eq!((fixed.budget(), fixed.rank_floor(), fixed.rank_multiple()), (Budget::None, 0.0, 1));
    assert_eq!((fixed.sensitivity(), fixed.depth_weight()), (None, DepthWeight::Fixed(0.0)));
    assert_eq!((fixed.quant(), fixed.compensate()), (&[][..], Compensate::None));
    let quantized = recipe("quant = [\"rtn-int4-g32\"]\ncompensate = \"lorc\"\ncompensate-rank = \"4\"");
    assert_eq!((quantized.budget(), quantized.ranks()), (Budget::None, Ranks::Knapsack));
    assert_eq!((quantized.layout(), quantized.anchor(), quantized.elastic()), (Kind::FACTORS, None, false));
    assert_eq!(quantized.compensate_rank(), CompensateRank::Fixed(NonZeroUsize::new(4).unwrap()));
    let energy = recipe("ranks = \"energy:0.9\"");
    assert_eq!((energy.budget(), energy.rank_multiple()), (Budget::None, 1));
}

#[test]
fn keeping_everything_is_dense_whatever_else_is_said() {
    let recipe = |text: &str| Recipe::new(&toml::from_str(text).unwrap()).unwrap();
    for text in [
        "keep = 1",
        "keep = 1.0\nranks = \"uniform\"\nrank-multiple = 8\nelastic = true",
        "keep = 1\ncalibration = \"t\"\nsequential = true\nclip-gradients = true\ndamping-input = 0.1",
        "keep = 1\ncalibration = \"t\"\nshare = true\nsequential = false",
        "keep = 1\ncalibration = \"t\"\nmethod = \"svd\"\nranks = \"knapsack\"\nsensitivity = \"measured\"",
        "keep = 1\nstatistics = \"s\"",
    ] {
        let recipe = recipe(text);
        assert_eq!(recipe.approach, Approach::Dense(Format::Factored), "{text}");
        assert!(!recipe.measures_statistics() && !recipe.runs_trials() && recipe.inputs().next().is_none(), "{text}");
        let written = toml::to_string(&recipe.to_options()).unwrap();
        assert_eq!(written, "keep = 1.0\nformat = \"factored\"\nmax-shard-size = \"4000000000 B\"\n", "{text}");
        assert!(Recipe::new(&toml::from_str(&written).unwrap()).unwrap().is_dense());
    }
    for text in
        ["keep = 0.999", "keep = 1\nranks = \"energy:0.9\"", "ranks = \"full\"", "keep = 1\nquant = [\"rtn-int4\"]"]
    {
        assert!(!recipe(text).is_dense(), "{text}");
    }
    let keep = || RecipeOptions { keep: Some(1.0), ..Default::default() };
    check(RecipeOptions { clip_gradients: Some(true), ..keep() }, "no Gram of gradients");
    check(RecipeOptions { elastic: Some(true), layout: Some(Kind::FACTORS), ..keep() }, "has no effect");
    check(RecipeOptions { equal_bytes_baseline: Some(false), ..keep() }, "no codes with factors");
}

#[test]
fn what_has_no_order_reduces_nothing_or_fits_no_factors_is_known() {
    let unordered: Vec<Kind> = Kind::layouts().filter(|&kind| Unordered::new(kind).is_some()).collect();
    assert!(unordered.contains(&Kind::default()) && !unordered.contains(&Kind::FACTORS));
    assert_eq!(Reduction::new(Limit::Keep(1.0)), None);
    assert_eq!(Reduction::new(Limit::Keep(0.5)).map(Reduction::limit), Some(Limit::Keep(0.5)));
    assert_eq!(Compensator::new(Compensate::None), None);
    assert_eq!(Compensator::new(Compensate::Lorc).map(Compensator::method), Some(Compensate::Lorc));
}
