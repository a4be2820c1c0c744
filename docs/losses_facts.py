"""What docs/losses.md says of each loss that no docstring and no run of it can tell.

Names in TRL are read from the installed release and held by tests/parity; those elsewhere are what
each system documents.
"""

from typing import NamedTuple

PAPERS = {
  "Rafailov et al. 2023": "https://arxiv.org/abs/2305.18290",
  "Mitchell 2023": "https://ericmitchell.ai/cdpo.pdf",
  "Azar et al. 2023": "https://arxiv.org/abs/2310.12036",
  "Liu et al. 2023": "https://arxiv.org/abs/2309.06657",
  "Chowdhury et al. 2024": "https://arxiv.org/abs/2403.00409",
  "Ji et al. 2024": "https://arxiv.org/abs/2402.00856",
  "Chen et al. 2024": "https://arxiv.org/abs/2402.05369",
  "Jung et al. 2024": "https://arxiv.org/abs/2404.04656",
  "Wu et al. 2024": "https://arxiv.org/abs/2405.00675",
  "D'Oosterlinck et al. 2024": "https://arxiv.org/abs/2408.06266",
  "Lu et al. 2024": "https://arxiv.org/abs/2406.08414",
  "Melnyk et al. 2024": "https://arxiv.org/abs/2406.05882",
  "Wang et al. 2023": "https://arxiv.org/abs/2309.16240",
  "Meng et al. 2024": "https://arxiv.org/abs/2405.14734",
  "Xu et al. 2024": "https://arxiv.org/abs/2401.08417",
  "Hong et al. 2024": "https://arxiv.org/abs/2403.07691",
  "Ethayarajh et al. 2024": "https://arxiv.org/abs/2402.01306",
  "Lambert et al. 2024": "https://arxiv.org/abs/2411.15124",
  "Liu et al. 2024": "https://arxiv.org/abs/2409.06411",
  "Zhou et al. 2024": "https://arxiv.org/abs/2406.11827",
  "Gorbatovski et al. 2024": "https://arxiv.org/abs/2404.09656",
  "Pal et al. 2024": "https://arxiv.org/abs/2402.13228",
  "Xiao et al. 2024": "https://arxiv.org/abs/2412.14516",
  "Cho et al. 2025": "https://arxiv.org/abs/2506.12725",
  "Lan et al. 2025": "https://arxiv.org/abs/2507.21183",
  "Tang et al. 2024": "https://arxiv.org/abs/2402.05749",
  "Park et al. 2024": "https://arxiv.org/abs/2403.19159",
  "Omura et al. 2024": "https://arxiv.org/abs/2411.07595",
  "Zeng et al. 2024": "https://arxiv.org/abs/2404.11999",
  "Wu et al. 2024b": "https://arxiv.org/abs/2407.08639",
  "Wu et al. 2024c": "https://arxiv.org/abs/2407.07880",
  "Lee et al. 2025": "https://arxiv.org/abs/2502.13177",
  "Gupta et al. 2025": "https://arxiv.org/abs/2501.03884",
  "Xie et al. 2024": "https://arxiv.org/abs/2405.21046",
  "Lu et al. 2024b": "https://arxiv.org/abs/2406.10957",
  "Touvron et al. 2023": "https://arxiv.org/abs/2307.09288",
  "Amini et al. 2024": "https://arxiv.org/abs/2402.10571",
  "Munos et al. 2023": "https://arxiv.org/abs/2312.00886",
  "Schulman 2020": "http://joschu.net/blog/kl-approx.html",
}
"""Where to read what the docstrings cite."""


class Names(NamedTuple):
  """What a function, or a composition of functions, is called elsewhere; '' is absent or unknown.

  TRL's are `DPOConfig`'s loss types unless another config is named.
  """

  trl: str = ""
  reference_code: str = ""
  tunix: str = ""
  maxtext: str = ""


NAMES = {
  "`dpo_loss`": Names("`sigmoid`", "`loss=dpo`", '`algorithm="dpo"`', "`dpo.algo=dpo`"),
  "`dpo_loss`, `label_smoothing`": Names(
    "", "`loss.label_smoothing`", "`label_smoothing`", "`dpo.dpo_label_smoothing`"
  ),
  "`dpo_loss` of means": Names("`sigmoid_norm`"),
  "`dpo_loss` of `ld_dpo_log_probs`": Names("`sigmoid`, `ld_alpha`"),
  "`dpo_loss` times `wpo_weights`": Names("`sigmoid`, `use_weighting`"),
  "`ipo_loss` of sums": Names("", "`loss=ipo`"),
  "`ipo_loss` of means": Names("`ipo`"),
  "`hinge_loss`": Names("`hinge`"),
  "`robust_dpo_loss`": Names("`robust`, `label_smoothing`"),
  "`exo_pair_loss`": Names("`exo_pair`, `label_smoothing`"),
  "`nca_pair_loss`": Names("`nca_pair`"),
  "`bco_pair_loss`": Names("`bco_pair`"),
  "`sppo_hard_loss`": Names("`sppo_hard`"),
  "`apo_zero_loss`": Names("`apo_zero`"),
  "`apo_down_loss`": Names("`apo_down`"),
  "`discopop_loss`": Names("`discopop`, `discopop_tau`"),
  "`aot_loss`": Names("`aot`"),
  "`aot_unpaired_loss`": Names("`aot_unpaired`"),
  "`f_dpo_loss`, `forward_kl`": Names("`sigmoid`, `f_divergence_type=forward_kl`"),
  "`f_dpo_loss`, `js_divergence`": Names("`sigmoid`, `f_divergence_type=js_divergence`"),
  "`f_dpo_loss`, `alpha_divergence`": Names("`sigmoid`, `f_divergence_type=alpha_divergence`"),
  "`simpo_loss` of means": Names("CPO `simpo`, `simpo_gamma`"),
  "`alphapo_loss` of means": Names("CPO `simpo`, `simpo_gamma`, `alpha`"),
  "`dpo_loss` + `nll_loss` of means (RPO)": Names("`sigmoid,sft`, `loss_weights`"),
  "`dpop_loss`, `cal_dpo_loss`, `bdpo_loss`, `mappo_loss`": Names(),
  "`gpo_exponential_loss`, `gpo_truncated_quadratic_loss`, `gpo_savage_loss`": Names(),
  "`r_dpo_loss`, `h_dpo_loss`, `tdpo1_loss`, `tdpo2_loss`": Names(),
  "`beta_dpo_loss`, `epsilon_dpo_loss`, `dr_dpo_weights`, `sampo_log_probs`, `odpo_loss`": Names(),
  "`bradley_terry_loss` with a `margin`": Names("`RewardTrainer`, a column `margin`"),
  "`xpo_loss`": Names("`XPOTrainer`, `alpha`"),
  "`nash_md_loss`": Names("`NashMDTrainer`"),
  "`cpo_loss`": Names("CPO `sigmoid`, `cpo_alpha=0`", "`loss.reference_free`", "`ref_model=None`"),
  "`cpo_loss` + `nll_loss`": Names("CPO `sigmoid`, `cpo_alpha`"),
  "`hinge_loss`, reference of zeros": Names("CPO `hinge`"),
  "`ipo_loss` of means, reference of zeros": Names("CPO `ipo`"),
  "`orpo_loss` of means": Names("ORPO `orpo`, `beta`", "", "`lambda_orpo`", "`dpo.orpo_lambda`"),
  "`nll_loss` of sums": Names("", "`loss=sft`"),
  "`nll_loss`, summed over the batch, by its tokens": Names("`sft`"),
  "`kto_loss`": Names("KTO `kto`"),
  "`kto_loss`, `kl=0`": Names("KTO `apo_zero_unpaired`"),
  "`mix_reference`": Names("`sync_ref_model`, `ref_model_mixup_alpha`"),
}

SETTINGS = [
  ("`dpo_loss`", "beta 0.1; 0.5 for summaries", "batch 64, learning rate 1e-6", "paper"),
  ("`hinge_loss`", "beta (RSO's gamma) 0.05", "", "TRL"),
  ("`ipo_loss`", "", "batch 90, learning rate 1e-2 (bandits)", "TRL"),
  ("`robust_dpo_loss`", "beta 0.01, label_smoothing 0.1", "batch 16, learning rate 1e-3", "TRL"),
  ("`exo_pair_loss`", "beta 0.1, label_smoothing 1e-3", "batch 64, learning rate 1e-6", "TRL"),
  ("`nca_pair_loss`", "beta (the paper's alpha) 0.01", "batch 32, learning rate 5e-6", "TRL"),
  ("`bco_pair_loss`", "beta 0.01", "batch 128, learning rate 5e-7", "TRL"),
  ("`sppo_hard_loss`", "", "batch 64, learning rate 5e-7", "TRL"),
  ("`apo_zero_loss`, `apo_down_loss`", "beta 0.1", "batch 64, learning rate 2e-7", "TRL"),
  ("`discopop_loss`", "beta 0.05, tau 0.05", "batch 64, learning rate 5e-7", "TRL"),
  ("`simpo_loss`", "beta 2 to 2.5, gamma / beta 0.1 to 0.8", "learning rate 3e-7 to 1e-6", "SimPO"),
  ("`cpo_loss` + `nll_loss`", "beta 0.1, weight of the NLL 1", "learning rate 1e-4", "TRL"),
  ("`dpo_loss` + `nll_loss` (RPO)", "beta 0.01, weight of the NLL 0.005", "learning rate 5e-7", "TRL"),
  ("`orpo_loss`", "weight 0.1", "learning rate 5e-6", "TRL"),
  ("`kto_loss`", "beta 0.1, both weights 1", "", "TRL"),
  ("`ld_dpo_log_probs`", "alpha 0.5 to start from", "", "TRL"),
  ("`mix_reference`", "alpha 0.6 every 512 steps, beta 0.05", "learning rate 1e-6", "TRL"),
  ("`unlikelihood_loss`", "alpha 0.05, 0.1, 0.5, 1", "", "paper"),
  ("`dpop_loss`", "beta 0.3, weight 50", "", "paper, Sec. 5, in notes on v2"),
  ("`bdpo_loss`", "mix 0.5", "", "author's article"),
  ("`tdpo2_loss`", "beta 0.1, alpha 0.5", "", "authors' code"),
  (
    "`beta_dpo_loss`, `beta_dpo_filter`",
    "beta 0.1, alpha 0.6, share 0.8, running means of 0.9",
    "batch 64, learning rate 5e-7",
    "authors' code",
  ),
  ("`dr_dpo_weights`", "tau 1, beta 0.1", "batch 64", "authors' code"),
]
"""Function, knobs, training, and who reports them: the paper, TRL's paper index, SimPO's README."""

READ = {
  "dpop_loss": (
    "paper, Eq. 3, as quoted in notes on v2; PaddleNLP, SamPO's repository",
    "inside of the sigmoid, times beta, here, there and in the paper; mlx-lm and others add weight "
    "max(0, -h_w) outside",
  ),
  "cal_dpo_loss": (
    "authors' `scripts/dpo_trainer.py` (tengxiao1/Cal-DPO); the paper's listing in a copy",
    "weight 1/2 in the repository, 1 in the listing; neither has beta in the logistic term",
  ),
  "bdpo_loss": (
    "an author's article on the paper; two other implementations",
    "some implementations call 1 - mix alpha",
  ),
  "mappo_loss": ("paper, Eq. 8 (v5)", "the paper's text; its gradient, Eq. 10, leaves out one beta in u"),
  "gpo_exponential_loss": ("one other implementation; named in BPO's table of GPO's losses", "none seen"),
  "gpo_truncated_quadratic_loss": (
    "one other implementation; named in BPO's table of GPO's losses",
    "none seen",
  ),
  "gpo_savage_loss": ("one other implementation; named in BPO's table of GPO's losses", "none seen"),
  "r_dpo_loss": ("SamPO's `dpo_trainer.py` (`lenN`); it follows from the reward r - alpha |y|", "none seen"),
  "h_dpo_loss": ("one other implementation; it follows from the objective, which a test holds", "none seen"),
  "tdpo1_loss": ("authors' `trainers.py` (Vance0124/Token-level-Direct-Preference-Optimization)", "none"),
  "tdpo2_loss": (
    "authors' `trainers.py` (Vance0124/Token-level-Direct-Preference-Optimization)",
    "SamPO's repository has it too; others stop the gradient of both D",
  ),
  "beta_dpo_loss": (
    "authors' `trainers.py` (junkangwu/beta-DPO)",
    "one beta a batch, of the pairs kept, here and there; other implementations give each pair its own",
  ),
  "beta_dpo_filter": ("authors' `trainers.py` (junkangwu/beta-DPO)", "none"),
  "epsilon_dpo_beta": (
    "authors' `trainer.py` (oddqueue/e-dpo)",
    "label_smoothing has no effect in the authors' code",
  ),
  "epsilon_dpo_loss": ("authors' `trainer.py` (oddqueue/e-dpo)", "as above"),
  "alphapo_loss": ("TRL's `CPOTrainer`, to which it is held", "none"),
  "sampo_log_probs": (
    "authors' `dpo_trainer.py` (LuJunru/SamPO)",
    "the authors draw tokens for policy and reference apart; here the same for both",
  ),
  "dr_dpo_weights": (
    "authors' `trainers.py` and README (junkangwu/Dr_DPO)",
    "theirs is the batch's loss, these the weights that give its gradient",
  ),
  "beta_dpo_beta": ("authors' `trainers.py` (junkangwu/beta-DPO)", "as above"),
  "running_margins": (
    "authors' `trainers.py` (junkangwu/beta-DPO)",
    "theirs move in evaluations too, here in training alone",
  ),
  "beta_dpo_batch": (
    "authors' `trainers.py` (junkangwu/beta-DPO)",
    "theirs divide a device's sum by the pairs it kept, here the step's by those of the step",
  ),
  "xpo_loss": ("TRL's `XPOTrainer` (0.22)", "none"),
  "nash_md_loss": (
    "TRL's `NashMDTrainer` (`_compute_losses`), and EGPO's `nash_md_pg_sample`",
    "TRL weighs each token's log-prob by that token's log-ratio; EGPO, as here, the sequence's by the "
    "sequence's. EGPO leaves out the 1/2, which is a baseline",
  ),
  "odpo_loss": (
    "authors' `trainers.py` (rycolab/odpo)",
    "theirs is given both scores, margin = alpha log(s_w - s_l), or of their ratio; alpha is 1 there",
  ),
}
"""Where the formulas that no golden vector of TRL holds were read, and where readings differ."""

BETA_IN_WORDS = {
  "dpo": "reaches any given loss at a smaller margin, so it moves less",
  "dpo, label_smoothing 0.1": "rests at a smaller margin",
  "odpo, margin 1": "is content with a larger log-ratio for the same margin, like DPO",
  "ipo": "rests at a smaller margin, and starts with a smaller push",
  "hinge": "is content at a smaller margin; the push until there is beta itself",
  "robust_dpo, label_smoothing 0.1": "like DPO; it has no lower bound, its push levels off",
  "exo_pair, label_smoothing 0.1": "rests at a smaller margin",
  "nca_pair": "rests the chosen response nearer to the reference",
  "bco_pair": "reaches any given loss at smaller log-ratios",
  "sppo_hard": "rests both responses nearer to the reference",
  "apo_zero": "saturates at smaller log-ratios, on the right side and on the wrong one",
  "apo_down": "saturates at smaller log-ratios; while h_l < 0 the chosen rests halfway, at h_l / 2",
  "discopop": "has its local minimum, on the wrong side of 0, nearer to the reference",
  "dpop": "like DPO; the penalty grows with it",
  "cal_dpo": "rests both responses nearer to the reference",
  "bdpo": "like DPO; a rejected response gains no more than -beta log(1 - mix)",
  "mappo, gap 0.5": "like DPO",
  "gpo_exponential": "like DPO; a margin on the wrong side counts exponentially",
  "gpo_truncated_quadratic": "is content at a smaller margin, and pushes harder until there",
  "gpo_savage": "saturates at smaller margins, on the right side and on the wrong one",
  "f_dpo_forward_kl": "like DPO; below the reference a log-ratio counts exponentially",
  "f_dpo_js_divergence": "like DPO; what lies above the reference counts little",
  "f_dpo_alpha_divergence": "between DPO and the forward KL",
}
"""What each loss does when beta rises."""
