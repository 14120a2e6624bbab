//! The metric of the matrices of the vocabulary.
//!
//! A row of the embedding table is read where its token is, so that its error `e` costs `share · eᵀ G e`, with `G` the
//! second moment of the gradients at the rows that are read, and its share of the tokens. A row of the head makes one
//! logit of every state `x`: `E[g²] · eᵀ C e`, with `C` the second moment of the states and `g` the gradient at the
//! logit. A tied matrix has both costs. Their sum is not a product of two forms; the nearest of its kind adds the two
//! weights of a row, and mixes the two forms in proportion to all that they weigh.

use anyhow::Result;
use faer::{Mat, Scale};

use crate::approx::gram::Gram;
use crate::calibrate::Statistics;
use crate::model::inventory::VocabularyUse;
use crate::operator::Shape;

/// The two sides of the metric of a matrix (vocab_size, n).
pub(super) struct Vocabulary {
    /// The weights of its rows.
    pub rows: Vec<f64>,
    /// The form (n, n) of their errors.
    pub columns: Gram,
}

/// # Errors
/// The statistics were not measured, or belong to another shape.
pub(super) fn of(statistics: &Statistics, of: VocabularyUse, (vocab_size, n): Shape) -> Result<Vocabulary> {
    if of == VocabularyUse::Table {
        let (rows, gram) = statistics.table(vocab_size, n)?;
        return Ok(Vocabulary { rows, columns: gram.into() });
    }
    let (squares, states) = statistics.head(vocab_size, n)?;
    if of == VocabularyUse::Head {
        return Ok(Vocabulary { rows: squares, columns: states.into() });
    }
    let (shares, gradients) = statistics.table(vocab_size, n)?;
    Ok(sum((shares, gradients.to_dense()), (squares, states.to_dense())))
}

/// The sum of two costs, each of weights of rows and a form.
fn sum((first, one): (Vec<f64>, Mat<f64>), (second, other): (Vec<f64>, Mat<f64>)) -> Vocabulary {
    let trace = |form: &Mat<f64>| (0..form.nrows()).map(|i| form[(i, i)]).sum::<f64>();
    let (of_one, of_other) = (trace(&one), trace(&other));
    let rows: Vec<f64> = first.iter().zip(&second).map(|(a, b)| a * of_one + b * of_other).collect();
    // Forms of trace 1, in proportion to the whole weight of each.
    let (all_first, all_second): (f64, f64) = (first.iter().sum(), second.iter().sum());
    let whole = (all_first * of_one + all_second * of_other).max(f64::MIN_POSITIVE);
    let columns = one * Scale(all_first / whole) + other * Scale(all_second / whole);
    Vocabulary { rows, columns: columns.into() }
}

#[cfg(test)]
mod tests {
    use faer::mat;

    use super::*;

    #[test]
    fn a_sum_of_costs_with_one_form_is_exact() {
        let form = mat![[2.0, 0.5], [0.5, 1.0]];
        let Vocabulary { rows, columns } = sum((vec![1.0, 3.0], form.clone()), (vec![2.0, 0.0], &form * Scale(4.0)));
        let Gram::Dense(columns) = columns else { panic!("two forms are added") };
        for (row, weight) in rows.into_iter().zip([1.0 + 2.0 * 4.0, 3.0]) {
            assert!((&columns * Scale(row) - &form * Scale(weight)).norm_max() < 1e-12);
        }
        // If one cost is nothing, the other is left.
        let Vocabulary { rows, columns } =
            sum((vec![1.0, 3.0], form.clone()), (vec![0.0, 0.0], mat![[9.0, 0.0], [0.0, 0.0]]));
        let Gram::Dense(columns) = columns else { panic!("two forms are added") };
        assert!((columns * Scale(rows[1]) - form * Scale(3.0)).norm_max() < 1e-12);
    }

    #[test]
    fn the_weights_of_rows_and_of_forms_are_those_of_the_whole_cost() {
        let (one, other) = (mat![[2.0, 0.0], [0.0, 0.0]], mat![[0.0, 0.0], [0.0, 5.0]]);
        let Vocabulary { rows, columns } = sum((vec![1.0, 2.0], one), (vec![4.0, 1.0], other));
        let Gram::Dense(columns) = columns else { panic!("two forms are added") };
        // A row's error of length 1 in every direction costs the sum of both traces.
        assert_eq!(rows, [1.0 * 2.0 + 4.0 * 5.0, 2.0 * 2.0 + 1.0 * 5.0]);
        // All rows in one direction cost what they cost apart.
        let all: f64 = rows.iter().sum();
        assert!((all * columns[(0, 0)] - 3.0 * 2.0).abs() < 1e-12 && (all * columns[(1, 1)] - 5.0 * 5.0).abs() < 1e-12);
    }
}
