//! What a user is told who asked for everything to be mapped, and did not get it: a sentence for each cause, once a VM.

use premap::{Fate, Reason, Report, Stage, Unmapped};
use premap_exec_settings::{Settings, Strategy};

/// Why bytes were not mapped, and where.
pub(crate) type Cause = (Stage, Reason);

/// What a report says was not mapped, by cause, in words. What another run takes up is no shortfall, nor is what follows
/// from another cause.
pub(crate) fn shortfalls(report: &Report, settings: &Settings) -> Vec<(Cause, String)> {
    let mut causes: Vec<(u64, &Unmapped)> = Vec::new();
    for lost in report.unmapped.iter().filter(|lost| is_cause(lost.reason)) {
        let bytes = lost.range.bytes();
        // Both stages lose what the host stage does not get: that is told once.
        match causes.iter_mut().find(|(_, first)| first.reason == lost.reason) {
            Some((sum, first)) if first.stage == lost.stage => *sum = sum.saturating_add(bytes),
            Some(_) => {}
            None => causes.push((bytes, lost)),
        }
    }
    let told = causes
        .into_iter()
        .map(|(bytes, first)| ((first.stage, first.reason), sentence(bytes, first, report, settings)));
    let unsupported = report.second.unsupported.map(|why| {
        let ahead = match settings.strategy {
            Strategy::SecondOnly => "nothing is mapped ahead",
            _ => "the guest's addresses are not mapped ahead, only the host's pages",
        };
        ((Stage::Second, Reason::Unsupported(why)), format!("{ahead}: {why}"))
    });
    unsupported.into_iter().chain(told).collect()
}

fn is_cause(reason: Reason) -> bool {
    !matches!(
        reason,
        Reason::NotAsked
            | Reason::HostStageFailed
            | Reason::Unsupported(_)
            | Reason::Stopped
            | Reason::NoMemslot
    )
}

fn sentence(bytes: u64, first: &Unmapped, report: &Report, settings: &Settings) -> String {
    let (size, why) = (size(bytes), report.explain(first));
    let left = format!("{size} of the guest are left to its faults");
    match first.reason {
        Reason::HostMemory(kind) => {
            let limit = report.limit.clone().unwrap_or_else(|| kind.to_string());
            let way = match settings.limit {
                None => ", or say by --limit SIZE how much may be taken all the same",
                Some(_) => "",
            };
            format!("{left}, since it does not fit into {limit}; raise that{way}")
        }
        Reason::Budget => format!("{left}: what --limit allows is taken"),
        Reason::Deadline => format!("{left}: --deadline has passed"),
        Reason::FileHole | Reason::UnknownFile => {
            format!("{left}: {why}; shared memory in a memfd, on tmpfs or on hugetlbfs can be mapped ahead")
        }
        reason if reason.fate() == Fate::Failed => {
            let stage = match first.stage {
                Stage::Host => "host",
                Stage::Second => "second",
            };
            format!("{size} could not be mapped at the {stage} stage, the first at {}: {why}", first.range)
        }
        _ => format!("{left}: {why}"),
    }
}

/// A size in the largest unit of which there is one at least.
pub(crate) fn size(bytes: u64) -> String {
    match bytes.checked_ilog2().unwrap_or(0) {
        20.. => format!("{} MiB", bytes >> 20),
        10..20 => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use premap::{Gpa, GpaRange, HostLimit, Unsupported};

    use super::*;

    fn report(lost: &[(Stage, u64, u64, Reason)]) -> Report {
        let unmapped = |(stage, start, bytes, reason): &(Stage, u64, u64, Reason)| Unmapped {
            stage: *stage,
            range: GpaRange::new(Gpa::new(*start), *bytes),
            reason: *reason,
        };
        Report { unmapped: lost.iter().map(unmapped).collect(), ..Report::default() }
    }

    #[track_caller]
    fn check(report: &Report, settings: &Settings, expected: &[&[&str]]) {
        let told: Vec<_> = shortfalls(report, settings).into_iter().map(|(_, words)| words).collect();
        assert_eq!(told.len(), expected.len(), "{told:#?}");
        for (told, parts) in told.iter().zip(expected) {
            assert!(parts.iter().all(|part| told.contains(part)), "{told:?} lacks one of {parts:?}");
        }
    }

    #[test]
    fn each_cause_is_told_once_with_all_its_bytes() {
        let settings = Settings::default();
        check(&Report::default(), &settings, &[]);
        let errno = Reason::Errno(premap_kvm::Errno::NOMEM);
        let mut lost = report(&[
            (Stage::Host, 0x1000, 0x2000, errno),
            (Stage::Host, 0x8000, 0x1000, errno),
            (Stage::Host, 1 << 30, 1 << 30, Reason::FileHole),
            (Stage::Second, 0x1000, 0x2000, Reason::HostStageFailed),
            (Stage::Second, 1 << 30, 1 << 30, Reason::FileHole),
            (Stage::Second, 4 << 30, 0x1000, Reason::Stopped),
        ]);
        lost.second.unsupported = Some(Unsupported::NotInKernel);
        let failed: &[&str] = &["12 KiB", "host stage", "0x1000"];
        let holes: &[&str] = &["1024 MiB", "hole", "tmpfs"];
        check(&lost, &settings, &[&["only the host's pages", "6.11"], failed, holes]);
        let alone = Settings { strategy: Strategy::SecondOnly, ..Settings::default() };
        check(&lost, &alone, &[&["nothing is mapped ahead", "6.11"], failed, holes]);
    }

    #[test]
    fn limits_are_told_with_the_way_out_that_is_left() {
        let deadline = report(&[(Stage::Host, 0, 1 << 20, Reason::Deadline)]);
        check(&deadline, &Settings::default(), &[&["1 MiB", "--deadline"]]);
        let limit = Some("the limit of a cgroup".to_owned());
        let short =
            Report { limit, ..report(&[(Stage::Host, 0, 1 << 30, Reason::HostMemory(HostLimit::Cgroup))]) };
        check(&short, &Settings::default(), &[&["1024 MiB", "the limit of a cgroup", "--limit SIZE"]]);
        let given = Settings { limit: Some(1 << 20), ..Settings::default() };
        let [(_, told)] = &shortfalls(&short, &given)[..] else { panic!("one cause") };
        assert!(!told.contains("--limit"), "{told}");
        check(&report(&[(Stage::Host, 0, 1 << 30, Reason::Budget)]), &given, &[&["what --limit allows"]]);
    }
}
