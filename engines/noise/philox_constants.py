"""Numbers of Philox and of the polynomials of `engines.noise.philox`, which all implementations share."""

ROUNDS = 7
"""The fewest that pass all of BigCrush (Salmon et al., table 2)."""
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

# Least-squares fits on Chebyshev nodes, rounded to single precision, from the lowest power up. They are as
# short as the noise allows, since arithmetic is what limits its rate on a GPU: a perturbation of 1e-5
# relative error is far below what rounding the perturbed weight to 16 bits does.
# -2 ln(1 + f) = f (-2 + f Q(f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1], relative error 1e-5;
LOG_Q = (0.999794602394104, -0.6655375361442566, 0.508656919002533, -0.4378918409347534, 0.2794889211654663)
# sin(pi w) = w S(w^2) for |w| <= 1/2, error 1.1e-6;
SIN_S = (3.1415903568267822, -5.1674065589904785, 2.5440104007720947, -0.5594624280929565)
# cos(pi w) = C(w^2) for |w| <= 1/2, error 6.8e-6.
COS_C = (0.9999932646751404, -4.933934688568115, 4.041248321533203, -1.2220317125320435)
COINS = 32
"""Of a binomial draw: the bits of one word, of which those that are set are counted."""
COINS_SCALE = 0.3535533845424652
"""1 / sqrt(8), 8 being the variance of that count."""
MINUS_2_LN_2 = -1.3862943649291992
ROOT_BITS = 0x5F3759DF
"""1 / sqrt(x) is about the float of bits `ROOT_BITS` - bits(x) / 2; two Newton steps make its error 5e-6."""
SQRT_HALF_BITS = 0x3F3504F3
"""sqrt(1/2) as a float's bits: mantissas are taken from [sqrt(1/2), sqrt(2)), where ln is smallest."""
