//! Compresses a checkpoint to 80 % of the parameters of its linears: `compress MODEL OUT`.

use std::path::Path;

use anyhow::{Context, Result};
use lrc::compress::recipe::{Recipe, RecipeOptions};
use lrc::compress::{Job, compress, view};
use lrc::progress::Silent;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (source, output) = args.next().zip(args.next()).context("usage: compress MODEL OUT")?;
    let recipe = Recipe::new(&RecipeOptions { keep: Some(0.8), ..RecipeOptions::default() })?;
    let checkpoint = view(lrc::model::open(Path::new(&source))?, &recipe)?;
    let job = Job::new(&checkpoint, &source, &recipe, Path::new(&output));
    compress(&job, &Silent).map(drop)
}
