//! What the rows of a student's logits are compared with: the likely tokens of the teacher, and those of the text.

use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use crate::model::{log_sum_exp, softmax_in_place};

/// Tokens of a row whose probabilities are learned one by one; the others are learned as one.
const TOP: usize = 64;

/// The most likely tokens of the teacher in every row of a window.
#[derive(Default)]
pub(super) struct Likely {
    /// (n_rows, [`TOP`]), row-major.
    ids: Vec<u32>,
    /// Their probabilities.
    p: Vec<f32>,
}

impl Likely {
    /// Of the logits (n_rows, vocab_size).
    pub fn add(&mut self, logits: &[f32], vocab_size: usize) {
        let n = TOP.min(vocab_size);
        for row in logits.chunks_exact(vocab_size) {
            let mut order: Vec<u32> = (0..vocab_size as u32).collect();
            let falling = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
            if n < vocab_size {
                order.select_nth_unstable_by(n, falling);
            }
            let log_sum = log_sum_exp(Arch::new(), row) as f32;
            self.p.extend(order[..n].iter().map(|&id| (row[id as usize] - log_sum).exp()));
            self.ids.extend(&order[..n]);
        }
    }

    /// The summed losses of the student's logits of some `rows`, (n_rows, vocab_size), which become their gradients.
    pub fn loss(&self, rows: Range<usize>, logits: &mut [f32], vocab_size: usize, labels: Labels<'_>) -> f64 {
        let n = TOP.min(vocab_size);
        let of_rows = rows.start * n..rows.end * n;
        let likely = self.ids[of_rows.clone()].par_chunks_exact(n).zip(self.p[of_rows].par_chunks_exact(n));
        let each = logits.par_chunks_exact_mut(vocab_size).zip(likely).zip(rows);
        let each = each.map(|((row, (ids, p)), at)| loss(row, ids, p, labels.of(at)));
        each.collect::<Vec<f64>>().into_iter().sum()
    }
}

/// The tokens of a window as what is to be predicted.
#[derive(Clone, Copy)]
pub(super) struct Labels<'a> {
    pub tokens: &'a [u32],
    /// The share of their negative log-likelihood in the loss; the rest is divergence (Hinton, Vinyals & Dean 2015, §2).
    pub share: f64,
}

impl Labels<'_> {
    /// The token that follows a row, with its share in the loss; the last row has none.
    fn of(self, row: usize) -> Option<(u32, f64)> {
        self.tokens.get(row + 1).map(|&token| (token, self.share)).filter(|(_, share)| *share > 0.0)
    }
}

/// The loss of a student's row of logits: the KL divergence from the likely tokens of the teacher, all others being one,
/// and for its share the negative log-likelihood of the label. The row becomes the gradient, `q − t`: `t` has the
/// label's share at the label, and is the teacher elsewhere, whose rest is shared as the student's is.
fn loss(row: &mut [f32], ids: &[u32], p: &[f32], label: Option<(u32, f64)>) -> f64 {
    softmax_in_place(Arch::new(), row);
    let log = |p: f64, q: f64| if p > 0.0 { p * (p / q.max(f64::MIN_POSITIVE)).ln() } else { 0.0 };
    let (mut rest_p, mut rest_q, mut divergence) = (1.0f64, 1.0f64, 0.0f64);
    for (&id, &p) in ids.iter().zip(p) {
        let q = f64::from(row[id as usize]);
        divergence += log(f64::from(p), q);
        (rest_p, rest_q) = (rest_p - f64::from(p), rest_q - q);
    }
    let (rest_p, rest_q) = (rest_p.max(0.0), rest_q.max(1e-12));
    divergence += log(rest_p, rest_q);
    let of_label = label.map_or(0.0, |(_, share)| share);
    let of_teacher = 1.0 - of_label;
    let likelihood = label.map_or(0.0, |(id, _)| f64::from(row[id as usize]).max(f64::MIN_POSITIVE).ln());
    let kept: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
    let share = (1.0 - of_teacher * (rest_p / rest_q)) as f32;
    row.iter_mut().for_each(|q| *q *= share);
    for ((&id, q), p) in ids.iter().zip(kept).zip(p) {
        row[id as usize] = q - of_teacher as f32 * p;
    }
    if let Some((id, share)) = label {
        row[id as usize] -= share as f32;
    }
    of_teacher * divergence - of_label * likelihood
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 11) % 29) as f32 / 4.0 - 3.0).collect()
    }

    fn softmax(row: &[f32]) -> Vec<f64> {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        row.iter().map(|&logit| f64::from(logit).exp() / sum).collect()
    }

    #[test]
    fn likely_tokens_are_the_largest_with_their_probabilities() {
        let vocab_size = 3 * TOP;
        let row = logits(vocab_size, 5);
        let mut likely = Likely::default();
        likely.add(&row, vocab_size);
        let p = softmax(&row);
        let least = likely.ids.iter().map(|&id| row[id as usize]).fold(f32::INFINITY, f32::min);
        let n_larger = row.iter().filter(|&&logit| logit > least).count();
        assert!(
            likely.ids.len() == TOP && n_larger < TOP && row.iter().filter(|&&logit| logit >= least).count() >= TOP
        );
        for (&id, &found) in likely.ids.iter().zip(&likely.p) {
            assert!((f64::from(found) - p[id as usize]).abs() < 1e-6);
        }
    }

    /// Against finite differences of its definition, with a share for a label and without.
    fn expect_slopes(ids: &[u32], label: Option<(u32, f64)>) {
        let n = 12;
        let teacher = softmax(&logits(n, 1));
        let p: Vec<f32> = ids.iter().map(|&id| teacher[id as usize] as f32).collect();
        let value = |row: &[f32]| {
            let q = softmax(row);
            let rest = |of: &[f64]| 1.0 - ids.iter().map(|&id| of[id as usize]).sum::<f64>();
            let joined =
                ids.iter().map(|&id| (teacher[id as usize], q[id as usize])).chain([(rest(&teacher), rest(&q))]);
            let divergence: f64 = joined.map(|(p, q)| p * (p / q).ln()).sum();
            let (token, share) = label.unwrap_or_default();
            (1.0 - share) * divergence - share * q[token as usize].ln()
        };
        let row = logits(n, 2);
        let mut gradient = row.clone();
        let found = loss(&mut gradient, ids, &p, label);
        assert!((found - value(&row)).abs() < 1e-5 && found > 0.01, "{found}");
        for i in 0..n {
            let moved = |by: f32| {
                let mut row = row.clone();
                row[i] += by;
                value(&row)
            };
            let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((f64::from(gradient[i]) - slope).abs() < 1e-4, "{i}: {} {slope}", gradient[i]);
        }
    }

    #[test]
    fn the_divergence_is_that_of_the_joined_distributions_and_its_gradient_the_difference() {
        expect_slopes(&[7, 1, 4], None);
        // All tokens: the usual divergence.
        let n = 12;
        let (all, teacher): (Vec<u32>, Vec<f64>) = ((0..n as u32).collect(), softmax(&logits(n, 1)));
        let p: Vec<f32> = teacher.iter().map(|&p| p as f32).collect();
        let (mut row, q) = (logits(n, 2), softmax(&logits(n, 2)));
        let expected: f64 = teacher.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((loss(&mut row, &all, &p, None) - expected).abs() < 1e-5);
    }

    #[test]
    fn a_label_takes_its_share_of_loss_and_gradient() {
        // Among the teacher's likely tokens, not among them, and alone.
        for label in [(4, 0.3), (9, 0.5), (9, 1.0)] {
            expect_slopes(&[7, 1, 4], Some(label));
        }
    }

    #[test]
    fn a_row_is_labelled_with_the_token_behind_it() {
        let labels = Labels { tokens: &[5, 6, 7], share: 0.25 };
        assert_eq!([0, 1, 2].map(|row| labels.of(row)), [Some((6, 0.25)), Some((7, 0.25)), None]);
        assert_eq!(Labels { share: 0.0, ..labels }.of(0), None);
    }
}
