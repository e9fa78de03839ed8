//! Every scenario on the software KVM, as the oldest and as the newest release that it knows.

use premap_guest::Soft;
use premap_softkvm::{Profile, SoftConfig, Tdp};

mod v6_12 {
    fn kernel() -> Option<super::Soft> {
        Some(super::Soft::new(super::Profile::V6_12))
    }

    conformance::test_every_scenario!(kernel);
}

mod v7_2 {
    fn kernel() -> Option<super::Soft> {
        Some(super::Soft::new(super::Profile::V7_2))
    }

    conformance::test_every_scenario!(kernel);
}

mod without_tdp {
    fn kernel() -> Option<super::Soft> {
        Some(super::Soft::with_config(super::SoftConfig { tdp: super::Tdp::Off, ..Default::default() }))
    }

    conformance::test_every_scenario_without_tdp!(kernel);
}
