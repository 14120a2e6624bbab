//! The stage `blocks`: one half of a block after another learns to give the states of the teacher from the states of the
//! student, as far as it is healed.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::Tensor;
use serde_json::json;

use super::metric::Metrics;
use super::rounding::{self, Inputs, Rounding};
use super::tensors::{Healed, Selected};
use crate::checkpoint::Checkpoint;
use crate::model::{Block, Decoder, Half, Hidden, Trained, Walk};
use crate::progress::{Progress, Stage};
use crate::report::{HealedHalf, HealedPart};
use crate::store::{Journal, Values};
use crate::train::{Course, Objective, Pieces, Settings, Variables, fit, held_out};

/// The windows on their way through teacher and student.
pub(super) struct Halves<'a> {
    pub teacher: &'a Decoder<'a>,
    pub student: &'a Decoder<'a>,
    pub trained: &'a Selected,
    /// The student's files.
    pub checkpoint: &'a Checkpoint,
    pub walk: &'a Walk<'a>,
    pub pieces: &'a Pieces,
    pub settings: &'a Settings,
    pub metrics: &'a Metrics,
    pub journal: &'a Journal,
}

impl Halves<'_> {
    /// Heals block after block, beginning with what was `healed` so far; returns what training did.
    ///
    /// # Errors
    /// The models cannot be read or run, or a loss is not finite.
    pub fn run(&self, healed: &mut Healed, progress: &dyn Progress) -> Result<Vec<HealedPart>> {
        let Self { teacher, student, walk, settings, .. } = *self;
        let mut parts = Vec::new();
        let [mut target, mut state] = [walk.embed(teacher)?, walk.embed(student)?];
        let n_halves: usize = teacher.n_blocks() * 2;
        let n_steps = n_halves * settings.epochs * self.pieces.trained.len();
        let stage = progress.stage("heal", n_steps as u64, "windows");
        for block_idx in 0..teacher.n_blocks() {
            let of_teacher = teacher.block(block_idx)?;
            let variables = self.trained.variables(student, self.checkpoint, block_idx..block_idx + 1, healed)?;
            for &half in of_teacher.halves() {
                stage.note(&format!("{} of {}", named(half).name(), student.block_name(block_idx)));
                let after = walk.through(&target, teacher, &of_teacher, half)?;
                let lesson = Lesson { on: self, block_idx, half, states: &state, targets: &after, scale: 1.0 };
                let (changed, part) = self.piece(&lesson, &variables, stage.as_ref())?;
                healed.extend(changed);
                parts.push(part);
                let block = lesson.model(&variables.detached())?;
                let next = walk.through(&state, student, &block, half)?;
                walk.release(std::mem::replace(&mut target, after));
                walk.release(std::mem::replace(&mut state, next));
            }
        }
        Ok(parts)
    }

    /// Trains a half, or takes it from the journal; the variables have its values then.
    fn piece(&self, lesson: &Lesson<'_>, variables: &Variables, stage: &dyn Stage) -> Result<(Healed, HealedPart)> {
        let key = format!("healed-{}-{}", lesson.block_idx, named(lesson.half).name());
        let before = variables.values()?;
        if let Some(mut piece) = self.journal.get(&key)? {
            let (names, part): (Vec<String>, HealedPart) = serde_json::from_value(piece.fields.take())?;
            let mut healed = Healed::new();
            for name in names {
                healed.insert(name, piece.take()?.read()?.f32s()?);
            }
            let values: Vec<Vec<f32>> = variables
                .iter()
                .zip(before)
                .map(|((name, _), before)| healed.get(name).cloned().unwrap_or(before))
                .collect();
            variables.set(&values)?;
            stage.advance((self.settings.epochs * self.pieces.trained.len()) as u64);
            return Ok((healed, part));
        }
        let part = self.train(lesson, variables, stage)?;
        let values = variables.values()?;
        let changed = variables.iter().zip(before).zip(values).filter(|((_, before), after)| before != after);
        let healed: Healed = changed.map(|(((name, _), _), after)| (name.to_string(), after)).collect();
        let arrays = healed.values().cloned().map(Values::from).collect();
        self.journal.put(&key, json!([healed.keys().collect::<Vec<_>>(), part]), arrays)?;
        Ok((healed, part))
    }

    fn train(&self, lesson: &Lesson<'_>, variables: &Variables, stage: &dyn Stage) -> Result<HealedPart> {
        let Self { walk, pieces, settings, .. } = *self;
        let workers = walk.workers();
        let part = |error: [f64; 2], course: Course| HealedPart {
            block: lesson.block_idx,
            half: named(lesson.half),
            error_before: error[0],
            error_after: error[1],
            best_epoch: course.best,
            trained: course.trained,
            held_out: course.held_out,
        };
        let before = held_out(variables, lesson, pieces, workers)?;
        if before == 0.0 {
            stage.advance((settings.epochs * pieces.trained.len()) as u64);
            return Ok(part([0.0; 2], Course::default()));
        }
        let lesson = &Lesson { scale: 1.0 / before, ..*lesson };
        let start = variables.values()?;
        let course = fit(variables, lesson, pieces, settings, workers, None, stage)?;
        let mut rounding = Rounding::new(self.checkpoint, variables)?;
        rounding.feed_back(lesson.block_idx, lesson.inputs(variables)?)?;
        variables.set(&rounding.values(variables))?;
        let after = held_out(variables, lesson, pieces, workers)? * before;
        // Rounding to the dtype of the file may cost more than training gained.
        if after < before {
            return Ok(part([before, after], course));
        }
        variables.set(&start)?;
        Ok(part([before; 2], Course { best: 0, ..course }))
    }
}

/// One half, with the states before it in the student and after it in the teacher.
#[derive(Clone, Copy)]
struct Lesson<'a> {
    on: &'a Halves<'a>,
    block_idx: usize,
    half: Half,
    states: &'a Hidden,
    targets: &'a Hidden,
    /// 1 over the error before training, so that losses are relative.
    scale: f64,
}

impl Lesson<'_> {
    /// The inputs of the linears of the half in the trained windows.
    fn inputs(&self, variables: &Variables) -> Result<Inputs> {
        let (walk, block) = (self.on.walk, self.model(&variables.detached())?);
        let windows = rounding::read(self.on.pieces, walk);
        let observed = |i: usize| {
            let mut inputs = Inputs::default();
            let x = walk.window(self.states, windows[i])?.unsqueeze(0)?;
            block.through(self.half, &x, walk.rope(), &mut |site, x| inputs.add(site, x))?;
            Ok(inputs)
        };
        let mut all = Inputs::default();
        walk.workers().in_order(windows.len(), observed, |_, inputs| all.join(inputs))?;
        Ok(all)
    }
}

impl Objective for Lesson<'_> {
    type Model = Block;

    fn model(&self, tensors: &HashMap<String, Tensor>) -> Result<Block> {
        let trained = Trained { below: self.on.checkpoint, variables: tensors };
        self.on.student.with_weights(&trained).block(self.block_idx)
    }

    /// `scale · mean eᵀ G e` over tokens, with `e` (hidden_size) the difference of the states.
    fn loss(&self, block: &Block, window_idx: usize) -> Result<Tensor> {
        let walk = self.on.walk;
        let before = walk.window(self.states, window_idx)?.unsqueeze(0)?;
        let after = block.through(self.half, &before, walk.rope(), &mut |_, _| Ok(()))?.squeeze(0)?;
        let difference = (after - walk.window(self.targets, window_idx)?)?; // (n_tokens, hidden_size)
        let weighted = match self.on.metrics.get(self.block_idx, self.half) {
            Some(metric) => difference.matmul(metric)?,
            None => difference.clone(),
        };
        let n_tokens = difference.dim(0)?;
        Ok((weighted * difference)?.sum_all()?.affine(self.scale / n_tokens as f64, 0.0)?)
    }

    fn place(&self, window_idx: usize) -> String {
        let (half, block) = (named(self.half).name(), self.on.student.block_name(self.block_idx));
        format!("{} in healing {half} of `{block}`", self.on.walk.place()(window_idx))
    }
}

/// The half in reports.
fn named(half: Half) -> HealedHalf {
    match half {
        Half::Attention => HealedHalf::Attention,
        Half::FeedForward => HealedHalf::FeedForward,
        Half::Whole => HealedHalf::Whole,
    }
}
