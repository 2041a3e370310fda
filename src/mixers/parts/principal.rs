//! Principal directions: the eigenvectors of a covariance, by falling eigenvalue.

/// Unit eigenvectors of a symmetric `matrix` [n, n], those of the largest eigenvalues first; the largest component of each
/// is positive, so that the same matrix gives the same vectors. Jacobi's rotations, one pair of axes after the other, until
/// nothing is left beside the diagonal.
pub fn directions(mut matrix: Vec<f64>, n: usize) -> Vec<Vec<f64>> {
    /// Sweeps after which rotations no longer change a number; a dozen is usual.
    const SWEEPS: usize = 40;
    let a = &mut matrix;
    let mut vectors: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| (i == j) as u8 as f64).collect()).collect();
    let size = a.iter().map(|x| x * x).sum::<f64>();
    for _ in 0..SWEEPS {
        let beside: f64 = (0..n).flat_map(|p| (0..p).map(move |q| p * n + q)).map(|at| a[at] * a[at]).sum();
        if beside <= 1e-30 * size {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let turned = a[p * n + q];
                if turned == 0.0 {
                    continue;
                }
                // The smaller of the two angles that make the element 0.
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * turned);
                let tan = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let cos = 1.0 / tan.hypot(1.0);
                let sin = tan * cos;
                let turn = |x: f64, y: f64| (cos * x - sin * y, sin * x + cos * y);
                for i in 0..n {
                    (a[i * n + p], a[i * n + q]) = turn(a[i * n + p], a[i * n + q]);
                }
                for i in 0..n {
                    (a[p * n + i], a[q * n + i]) = turn(a[p * n + i], a[q * n + i]);
                    (vectors[p][i], vectors[q][i]) = turn(vectors[p][i], vectors[q][i]);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| a[j * n + j].total_cmp(&a[i * n + i]));
    let upright = |i: usize| {
        let largest = vectors[i].iter().copied().max_by(|x, y| x.abs().total_cmp(&y.abs())).unwrap_or(1.0);
        vectors[i].iter().map(|x| x * largest.signum()).collect()
    };
    order.into_iter().map(upright).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvectors_of_a_symmetric_matrix() {
        // V diag(5, 3, 3, 1, 0) Vᵀ for a reflection V = 1 - 2 u uᵀ, eigenvalues out of order.
        let u: Vec<f64> = [0.5, -0.1, 0.3, 0.7, 0.2].to_vec();
        let norm = u.iter().map(|x| x * x).sum::<f64>();
        let v = |i: usize, j: usize| (i == j) as u8 as f64 - 2.0 * u[i] * u[j] / norm;
        let values = [3.0, 0.0, 5.0, 1.0, 3.0];
        let cell = |i: usize, j: usize| (0..5).map(|k| v(i, k) * values[k] * v(j, k)).sum::<f64>();
        let matrix: Vec<f64> = (0..25).map(|at| cell(at / 5, at % 5)).collect();
        let found = directions(matrix.clone(), 5);
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        for (n, value) in [5.0, 3.0, 3.0, 1.0, 0.0].into_iter().enumerate() {
            let product: Vec<f64> = matrix.chunks(5).map(|row| dot(row, &found[n])).collect();
            for (x, y) in product.iter().zip(&found[n]) {
                assert!((x - value * y).abs() < 1e-12, "vector {n}");
            }
            for (m, other) in found.iter().enumerate() {
                assert!((dot(&found[n], other) - (n == m) as u8 as f64).abs() < 1e-12, "{n}, {m}");
            }
        }
    }
}
