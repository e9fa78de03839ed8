//! Every scenario on `/dev/kvm`.

conformance::test_every_scenario!(conformance::reach::linux_with_pre_fault);

#[test]
fn shadow_paging_gets_the_host_stage_and_the_reason() {
    use conformance::fixture::Fixture;
    use premap::{Engine, Unsupported};
    use premap_kvm::probe::PreFault;

    let Some((kernel, found)) = conformance::reach::linux() else { return };
    if found != PreFault::ShadowPaging {
        eprintln!("skipped: this /dev/kvm does not shadow its guests' page tables ({found})");
        return;
    }
    let mut fixture = Fixture::new(&kernel, 1, 64, premap_guest::Backing::Anonymous);
    let plan = fixture.plan();
    // Told of the VM the engine knows why; else it learns from the call that it can't be, and asks once only.
    let lent = fixture.machine.lend();
    let report = Engine::new().vm(lent.vm).run(&plan, lent.vcpus).unwrap();
    assert_eq!(report.second.unsupported, Some(Unsupported::ShadowPaging));
    assert_eq!((report.host.mapped, report.second.skipped), (plan.bytes(), plan.bytes()));
    let report = fixture.map(Engine::new(), &plan);
    assert_eq!((report.second.unsupported, report.second.calls), (Some(Unsupported::Unknown), 1));
    assert_eq!((report.host.mapped, report.second.skipped), (plan.bytes(), plan.bytes()));
    fixture.write_all();
}
