//! Scenarios run on every KVM in reach, by the same test body.
//!
//! A scenario makes a machine, does something to it, and looks at what came of it: the engine's report, the guest's
//! faults, the memory's content. It is generic over the kernel, so what holds on one must hold on the other; where
//! releases differ the scenario says what each may answer. `tests/soft.rs` runs all of them on the software KVM,
//! `tests/linux.rs` on `/dev/kvm` where that can pre-fault: in the lab, on real kernels. `tests/fork.rs` has those that fork,
//! since that makes every private page of a process shared for a while, whichever test it belongs to.

#![expect(clippy::missing_panics_doc, reason = "a scenario says by a panic that something does not hold")]

mod child;
pub mod fixture;
pub mod known_differences;
pub mod missing;
pub mod raw;
pub mod reach;
pub mod scenarios;
pub mod script;
pub mod storm;

/// Makes a test of each scenario, on the kernel that `$kernel()` gives, if it gives one.
#[macro_export]
macro_rules! test_every_scenario {
    ($kernel:path) => {
        $crate::test_every_scenario! { $kernel:
            background: memory_is_mapped_while_the_guest_runs,
            background: a_stop_midway_loses_nothing,
            background: a_slot_that_goes_with_its_memory_is_skipped,
            background: slots_come_and_go_under_the_guard,
            backings: every_backing_is_mapped_whole,
            backings: the_trap_is_reproduced_and_both_stages_avoid_it,
            backings: content_survives_being_mapped_twice,
            backings: reading_keeps_private_files_shared,
            gaps: a_hole_in_the_middle_is_skipped_to_the_byte,
            gaps: a_read_only_slot_is_mapped_for_reading,
            gaps: unmapped_host_memory_fails_to_the_byte,
            gaps: a_slot_removed_before_the_run_is_skipped,
            gaps: a_slot_removed_under_a_used_vcpu_never_hangs,
            gaps: dirty_logging_counts_what_was_mapped_ahead,
            limits: a_deadline_hits_midway,
            limits: a_stop_from_another_thread_hits_midway,
            limits: a_byte_budget_is_kept_and_the_rest_can_be_mapped_later,
            limits: a_signal_storm_loses_nothing,
            roles: paging_off_fills_the_root_that_paging_uses,
            roles: system_management_has_slots_and_a_root_of_its_own,
            roles: guest_mode_with_nested_paging_is_refused,
            roles: guest_mode_with_shadow_paging_has_a_root_of_its_own,
            roles: every_mode_leads_to_every_other,
            dirty_log: logging_splits_huge_pages_and_its_end_brings_them_back,
            dirty_log: a_mapping_that_is_there_is_made_anew_only_before_6_13,
            dirty_log: memory_that_is_told_to_be_logged_stays_clean,
            errnos: bad_arguments_are_refused_before_anything_is_looked_up,
            errnos: no_slot_is_enoent_and_noted_as_a_device,
            errnos: above_the_processors_addresses_nothing_is_noted,
            errnos: host_memory_without_access_is_efault,
            errnos: a_signal_before_the_first_page_is_eintr,
            errnos: a_page_that_user_space_owes_waits_until_a_signal,
            slots: a_slot_that_moves_in_use_takes_its_memory_along,
            slots: a_slot_that_is_deleted_in_use_is_gone_at_once,
            slots: slots_that_cannot_be_are_refused,
            slots: a_slot_made_again_under_a_pre_fault_is_mapped_in_the_end,
            slots: a_stale_root_costs_the_host_one_page,
            stress: pre_faulting_ends_with_the_slot_near_the_top_of_memory,
            stress: vcpus_that_renew_their_roots_find_their_mappings,
            stress: a_pre_fault_counts_pages_and_no_faults,
            private: a_guest_memfd_keeps_its_content_from_the_vmm,
            private: content_survives_conversion,
            private: a_private_page_that_is_not_there_goes_back_to_the_vmm,
            private: a_closed_guest_memfd_takes_its_pages_along,
            private: private_memory_is_pre_faulted_by_small_pages,
        }
    };
    ($kernel:path: $($room:ident: $scenario:ident,)*) => {
        $(
            #[test]
            fn $scenario() {
                if let Some(kernel) = $kernel() {
                    $crate::scenarios::$room::$scenario(&kernel);
                }
            }
        )*
    };
}

/// Makes a test of each scenario of a KVM without two-dimensional paging.
#[macro_export]
macro_rules! test_every_scenario_without_tdp {
    ($kernel:path) => {
        $crate::test_every_scenario! { $kernel:
            shadow: shadow_paging_gets_the_host_stage_and_the_reason,
            shadow: without_tdp_no_mode_can_be_pre_faulted,
        }
    };
}

/// Makes a test of each scenario that forks, for a process of its own.
#[macro_export]
macro_rules! test_every_scenario_that_forks {
    ($kernel:path) => {
        $crate::test_every_scenario! { $kernel:
            errnos: another_process_gets_eio,
        }
    };
}
