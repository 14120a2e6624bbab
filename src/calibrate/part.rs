//! Statistics of a part of a model, as parts of the statistics of the whole.

use std::sync::Arc;

/// A statistic that is a part of another one.
#[derive(Debug, Clone)]
pub struct SelectedStatistic {
    /// The name of the other.
    pub of: String,
    /// Its features, ascending, out of how many; `None` for all.
    pub features: Option<(Arc<[usize]>, usize)>,
}

impl SelectedStatistic {
    /// The part of an array: a vector, or a Gram as a packed lower triangle.
    pub(super) fn of(&self, values: Vec<f32>) -> Vec<f32> {
        let Some((features, whole)) = &self.features else { return values };
        if values.len() == *whole {
            return features.iter().map(|&i| values[i]).collect();
        }
        let row = |at: usize| features[..=at].iter().map(move |&j| (features[at], j));
        let places = (0..features.len()).flat_map(row);
        places.map(|(i, j)| values[i * (i + 1) / 2 + j]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_of_a_gram_is_the_gram_of_the_features() {
        let x: [[f32; 4]; 3] = [[1.0, 2.0, 3.0, 4.0], [5.0, -6.0, 7.0, 8.0], [9.0, 1.0, -2.0, 0.5]];
        let packed = |features: &[usize]| -> Vec<f32> {
            let rows = features.iter().enumerate();
            let pairs = rows.flat_map(|(at, &i)| features[..=at].iter().map(move |&j| (i, j)));
            pairs.map(|(i, j)| x.iter().map(|token| token[i] * token[j]).sum()).collect()
        };
        let selected =
            |features: &[usize]| SelectedStatistic { of: String::new(), features: Some((features.into(), 4)) };
        for features in [&[0, 2, 3][..], &[1], &[0, 1, 2, 3], &[]] {
            assert_eq!(selected(features).of(packed(&[0, 1, 2, 3])), packed(features));
        }
        assert_eq!(selected(&[1, 3]).of(x[1].to_vec()), [-6.0, 8.0]);
        assert_eq!(SelectedStatistic { of: String::new(), features: None }.of(x[0].to_vec()), x[0]);
    }
}
