"""What `pytest -m fast` runs: something of every module, in two minutes on two cores.

Whole files that are cheap, and of the others a few tests that need no trained run to start from.
"""

FILES = (
  "test_attention",
  "test_best_of_n",
  "test_confidence",
  "test_configs",
  "test_examples",
  "test_files",
  "test_from_gguf",
  "test_hostile_folders",
  "test_house",
  "test_judging",
  "test_loader",
  "test_losses_beyond",
  "test_losses_parity",
  "test_losses_theorem",
  "test_objectives",
  "test_ownership",
  "test_processes",
  "test_readme",
  "test_records",
  "test_step",
  "test_throughput",
)

TESTS = {
  "test_builders": (
    "test_every_form_comes_back_from_disk_as_it_was_parsed",
    "test_unusable_records_are_counted_by_reason",
    "test_a_second_call_reads_what_the_first_prepared",
    "test_shp_keeps_pairs_of_which_one_scores_twice_as_high",
    "test_tldr_puts_the_chosen_summary_first",
    "test_stack_exchange_pairs_answers_by_score",
    "test_imdb_gives_two_to_eight_words_of_a_review_and_keeps_the_rest",
    "test_html_is_stripped",
  ),
  "test_conversations": (
    "test_ids_and_scores_are_those_of_transformers",
    "test_tools_calls_and_every_key_that_a_template_reads_are_in_the_ids",
    "test_limits_change_nothing_that_a_template_writes",
    "test_names_of_special_tokens_are_text_or_tokens_or_an_error",
  ),
  "test_damage": ("test_checkpoints_without_digests_are_read_and_it_is_said",),
  "test_data_report": (
    "test_parts_that_are_not_scored_are_shown_as_such",
    "test_what_unique_prompts_leaves_out_is_said_and_all_held_out_is_refused",
  ),
  "test_enumerable": (
    "test_labels_are_drawn_from_bradley_terry",
    "test_the_optimum_is_worth_beta_log_z_and_nothing_at_its_kl_is_better",
  ),
  "test_evaluate": (
    "test_a_function_gives_the_win_rate_of_a_file",
    "test_answers_in_messages_are_judged_as_their_text",
    "test_what_cannot_be_compared_is_named",
    "test_a_judge_reads_the_query",
  ),
  "test_export": (
    "test_a_folder_that_is_not_the_policy_is_refused",
    "test_only_whole_responses_end_somewhere",
  ),
  "test_fused": (
    "test_the_form_suits_the_machine_unless_it_is_asked_for",
    "test_forward_and_gradients_lower_for_their_platform",
    "test_values_and_gradients_are_the_dense_ones",
  ),
  "test_log_probs": (
    "test_masked_tokens_and_blocks_of_the_vocabulary_give_the_naive_gradients",
    "test_bfloat16_hidden_states_are_accumulated_in_float32",
    "test_gradients_of_the_kl_are_those_of_finite_differences",
    "test_logits_at_t_score_the_token_at_t_plus_1",
  ),
  "test_lora": (
    "test_a_of_a_new_adapter_has_the_variance_of_pefts_draw_and_b_is_zero",
    "test_what_an_adapter_cannot_do_is_refused_by_name",
    "test_an_adapter_that_is_not_supported_is_named",
  ),
  "test_losses": (
    "test_a_loss_is_its_papers_formula",
    "test_loss_is_log_2_and_the_weight_one_half_where_policy_is_reference",
    "test_gradient_weighs_a_pair_by_how_wrong_its_reward_is",
    "test_plackett_luce_of_two_is_bradley_terry",
    "test_unpaired_losses_are_their_formulas",
  ),
  "test_models_hf": (
    "test_what_is_not_supported_is_named",
    "test_export_of_an_import_is_the_folder_bit_for_bit",
    "test_reading_and_writing_hold_one_tensor_at_a_time",
  ),
  "test_overoptimization": (
    "test_the_fit_recovers_a_and_b_and_the_hump_is_where_the_law_is_highest",
    "test_errors_are_those_of_leaving_out_a_run",
    "test_a_hump_is_told_with_whether_it_was_measured",
    "test_the_fall_is_from_the_step_that_another_seed_calls_best",
    "test_gains_by_kl_are_means_of_points",
  ),
  "test_packing": (
    "test_a_plan_is_a_function_of_seed_and_epoch",
    "test_every_step_holds_exactly_batch_size_comparisons_and_no_row_overflows",
    "test_responses_never_see_each_other_nor_other_comparisons",
  ),
  "test_parallel": ("test_fsdp_and_tensor_cut_the_parameters", "test_a_step_keeps_the_parameters_cut"),
  "test_plan": ("test_necessary_flops_are_those_of_the_formula", "test_arguments_are_those_of_a_placed_run"),
  "test_ppo": (
    "test_advantages_are_a_plain_loops",
    "test_the_two_losses_are_plain_loops",
    "test_settings_that_cannot_run_are_refused",
    "test_a_config_that_cannot_run_is_refused",
  ),
  "test_preference": (
    "test_first_loss_is_log_2_whatever_the_weights",
    "test_the_reference_gets_no_gradient",
    "test_padding_rows_change_nothing",
    "test_losses_add_with_their_weights_and_are_told_apart",
  ),
  "test_quickstart": ("test_the_true_reward_follows_its_rule",),
  "test_reference": (
    "test_a_computation_cut_off_goes_on_where_it_was",
    "test_a_damaged_file_is_named_and_computed_again",
    "test_labels_swapped_swap_what_was_stored",
  ),
  "test_reuse": ("test_log_probs_from_logits_and_from_hidden_states_are_the_same",),
  "test_sample": (
    "test_prompts_are_read_from_what_can_be_trained_on",
    "test_a_long_prompt_is_cut_as_in_training",
    "test_bad_prompts_are_named_by_their_line",
  ),
  "test_sampling": (
    "test_draws_follow_the_softmax_over_ids_of_several_blocks",
    "test_what_stays_is_the_fewest_likeliest_with_their_ties",
    "test_log_probs_are_those_of_the_training_primitive",
  ),
  "test_sentiment": ("test_sentences_that_cannot_be_read_are_refused_by_name",),
  "test_sweep": ("test_what_cannot_be_swept_is_refused_by_name",),
  "test_tokenization": (
    "test_truncation_is_the_papers_code_s",
    "test_a_chat_has_the_ids_of_its_template",
    "test_names_of_special_tokens_in_text_are_text",
    "test_usual_text_gets_the_ids_of_the_whole_text",
  ),
  "test_train": (
    "test_what_cannot_run_is_refused_by_name_and_with_the_fix",
    "test_a_value_of_the_wrong_type_is_named",
    "test_sft_then_dpo_starts_at_log_2_and_learns",
  ),
  "test_transformer": (
    "test_impossible_dimensions_are_named",
    "test_the_rule_of_who_sees_whom",
    "test_rotation_depends_on_distance_only",
  ),
  "test_watching": (
    "test_errors_are_over_prompts_and_absent_of_one_prompt",
    "test_what_cannot_run_is_refused",
  ),
}
