//! The scenarios that fork, on every KVM in reach. While a child lives every private page of the process is shared, whichever
//! test it belongs to: so they are apart from those that count faults.

use premap_guest::Soft;
use premap_softkvm::Profile;

mod v6_12 {
    fn kernel() -> Option<super::Soft> {
        Some(super::Soft::new(super::Profile::V6_12))
    }

    conformance::test_every_scenario_that_forks!(kernel);
}

mod v7_2 {
    fn kernel() -> Option<super::Soft> {
        Some(super::Soft::new(super::Profile::V7_2))
    }

    conformance::test_every_scenario_that_forks!(kernel);
}

mod linux {
    conformance::test_every_scenario_that_forks!(conformance::reach::linux_with_pre_fault);
}
