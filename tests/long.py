"""What `pytest -m long` runs: the longest tests, which a plain `pytest` leaves to `.ci/run long`.

Experiments in small from end to end, runs that are killed or in several processes, and of a test that goes
over many losses, optimizers or lifts those cases of whose kind a plain run has others. By file and
function: the cases that a plain run keeps.
"""

LONG = {
  "test_chaos": {"test_runs_that_are_killed_and_rivals_over_one_place_come_to_the_same_bits": ()},
  "test_benchmark": {
    "test_both_sides_of_a_trajectory_start_from_one_folder_one_adapter_and_the_same_ids": (),
    "test_the_side_of_dpojax_runs_and_all_sides_get_the_same_pairs": (),
  },
  "test_beta_ablation": {
    "test_beta_on_a_chat_model_in_small_tells_of_every_beta_and_goes_on": (),
    "test_the_beta_ablation_in_small_tells_of_every_beta": (),
  },
  "test_columns": {"test_pairs_of_one_beta_are_a_run_at_that_beta_and_of_several_are_not": ()},
  "test_data_report": {
    "test_a_dry_run_shows_what_is_scored_and_writes_no_workdir": (),
    "test_a_resumed_run_has_the_day_it_was_started_on": (),
    "test_a_run_whose_ids_have_changed_says_what_differs": (),
    "test_template_arguments_are_the_run_s_in_training_sampling_and_scores": (),
  },
  "test_displacement": {"test_the_experiment_in_small_tells_where_probability_goes_and_goes_on": ()},
  "test_enumerable": {"test_every_method_runs_and_none_is_above_the_optimum": ()},
  "test_evaluate": {"test_dpo_prefers_what_was_chosen_and_moves_from_its_reference": ()},
  "test_export": {
    "test_dpo_of_a_hugging_face_folder_is_exported_as_one": (),
    "test_the_export_ends_where_training_and_the_base_ended": ("lora",),
  },
  "test_knobs": {
    "test_a_lift_gives_the_step_of_one_device": ("tdpo2-lift1", "dpo-lift0"),
    "test_rows_in_parts_give_the_same_step": ("ipo",),
  },
  "test_launchers": {
    "test_the_slurm_script_trains_over_its_tasks_saves_at_sigterm_and_asks_to_be_started_again": ()
  },
  "test_lora": {
    "test_a_run_of_an_adapter_continues_bit_for_bit_and_on_the_same_base_only": (),
    "test_a_stored_reference_on_a_mesh_gives_the_losses_of_an_inline_one_under_pmap": (),
    "test_other_objectives_train_adapters_too": (),
    "test_pmap_and_mesh_train_the_adapter_of_one_device_and_cut_it_as_its_kernel": (),
  },
  "test_online": {
    "test_a_server_is_asked_nothing_twice_and_the_last_rounds_policy_is_the_reference": (),
    "test_an_adapter_on_a_mesh_samples_what_the_model_does_and_learns": (),
    "test_rankings_of_all_answers_are_trained_on_as_far_as_labels_reach": (),
    "test_shuffled_labels_destroy_the_gain": (),
    "test_two_processes_make_the_rounds_of_one": ("kindness-best_worst",),
  },
  "test_overoptimization": {"test_a_second_call_trains_nothing_again": ()},
  "test_packing": {"test_packed_rows_equal_single_sequences": ("2-llama", "4-gpt2")},
  "test_paper": {
    "test_hh_runs_from_dialogues_to_three_figures": (),
    "test_imdb_runs_from_reviews_to_the_frontier": (),
    "test_tldr_runs_from_comparisons_to_both_tables": (),
  },
  "test_parallel": {
    "test_a_lift_gives_the_step_of_one_device": ("mesh-2-2-2-2",),
    "test_bfloat16_gradients_of_a_mesh_are_no_further_from_float32_than_those_of_one_device": ("2-2-2",),
    "test_losses_over_the_whole_step_are_those_of_one_device": ("kto",),
    "test_rows_long_enough_for_attention_in_blocks_give_the_same_step": (),
    "test_two_processes_give_the_step_of_one_device": ("mesh-8-1-1",),
  },
  "test_paths": {"test_of_many_that_want_a_lease_at_once_one_has_it": ("s3",)},
  "test_plan": {
    "test_a_mesh_cuts_what_every_replica_holds_whole": (),
    "test_a_run_that_does_not_fit_is_refused_before_it_starts": (),
    "test_a_second_process_finds_what_the_first_has_compiled": (),
    "test_parts_and_recomputing_need_less": (),
    "test_the_command_prints_the_plan_of_simulated_devices": (),
  },
  "test_ppo": {
    "test_a_fixed_beta_approaches_the_closed_form_optimum": (),
    "test_a_run_learns_and_continues_after_a_kill_to_the_same_numbers": (),
    "test_a_step_on_weights_that_are_cut_is_that_of_one_device": (),
    "test_under_a_reward_model_scores_rise_and_an_adaptive_beta_holds_its_kl": (),
  },
  "test_preference": {
    "test_losses_of_every_token_start_as_dpo": (),
    "test_sampo_reads_as_many_tokens_as_the_shorter_response_has_anew_at_each_step": (),
  },
  "test_quickstart": {"test_the_quickstart_in_small_raises_the_true_reward": ()},
  "test_reference": {
    "test_a_stored_reference_gives_the_inline_run": ("shuffled", "mesh"),
    "test_the_next_run_of_a_sweep_finds_it_and_another_start_does_not": (),
  },
  "test_reuse": {
    "test_an_example_prints_its_curve": ("logits_only",),
    "test_an_example_starts_at_log_2_and_learns_to_rank_its_pairs": ("bare_jax", "logits_only"),
  },
  "test_sampling": {"test_params_cut_over_a_mesh_give_the_same_samples": ("together", "in_place")},
  "test_sentiment": {
    "test_a_prefix_ends_with_a_word_and_has_2_to_8_tokens": (),
    "test_choices_are_made_one_at_a_time_and_rounds_go_on_from_their_own_samples": (),
    "test_clear_pairs_are_those_far_apart": (),
    "test_dpo_on_text_raises_the_true_reward_and_one_step_of_ppo_runs": (),
    "test_of_each_pair_the_true_reward_prefers_the_chosen": (),
    "test_texts_of_another_kind_are_first_questions_and_their_ends_are_what_is_beaten": (),
    "test_the_best_of_more_is_better_and_the_true_reward_chooses_best": (),
    "test_the_classifier_knows_held_out_sentences_and_its_reward_is_a_probability": (),
    "test_the_reward_model_that_is_kept_is_the_one_with_the_best_accuracy": (),
    "test_win_rates_of_kept_policies_and_the_best_of_n": (),
  },
  "test_smollm2": {"test_the_experiment_in_small_writes_one_page_of_all_it_found_and_goes_on": ()},
  "test_sweep": {
    "test_a_member_is_the_run_it_would_be_alone": (),
    "test_a_reference_that_moves_is_each_members_own_and_is_there_again_after_a_kill": (),
  },
  "test_time_to_first": {"test_a_command_is_timed_by_stage_and_starts_sooner_with_what_was_compiled": ()},
  "test_topology": {
    "test_a_step_for_many_chips_is_traced_in_seconds_and_gathers_each_weight_once_a_pass": (),
    "test_a_stored_reference_is_not_gathered_and_of_an_adapter_no_base_is_scattered": (),
  },
  "test_train": {
    "test_a_reference_whose_layers_lie_otherwise_is_the_same_reference": ("True",),
    "test_a_run_with_any_loss_learns_what_is_preferred": (
      "dpo",
      "kto",
      "dpo_plackett_luce",
      "bdpo,mappo,gpo_exponential,gpo_truncated_quadratic,gpo_savage,f_dpo_forward_kl",
    ),
    "test_three_kills_change_nothing": (),
    "test_two_processes_train_and_sample_as_one": (),
    "test_two_processes_train_evaluate_and_continue_as_one": (),
  },
  "test_watching": {
    "test_a_beta_that_moves_is_in_the_metrics_of_a_run": (),
    "test_a_run_of_every_optimizer_continues_bit_for_bit": ("sgd",),
    "test_a_run_that_was_stopped_writes_the_same_samples": ("changes2",),
    "test_the_average_is_evaluated_and_loaded_and_params_are_trained": ("changes1", "changes2"),
  },
}


def is_long(file: str, function: str, case: str) -> bool:
  """Whether a plain run leaves out this case of a function of a file."""
  kept = LONG.get(file, {}).get(function)
  return kept is not None and case not in kept
