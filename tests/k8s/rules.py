"""Every rule, each a generator of complaints about one overlay's manifests."""

from collections.abc import Callable, Iterator

from tests.k8s import pod_rules, ray_rules
from tests.k8s.kustomize import Manifest

RULES: tuple[Callable[[list[Manifest]], Iterator[str]], ...] = (
    pod_rules.no_secret_is_in_the_tree,
    pod_rules.pods_run_without_privileges,
    pod_rules.workers_have_no_rights,
    ray_rules.upgrades_keep_the_cluster,
    ray_rules.ray_is_the_locked_one,
    ray_rules.the_head_does_no_work,
    ray_rules.ray_would_start,
    ray_rules.memory_adds_up,
    pod_rules.what_is_named_exists,
    pod_rules.budgets_can_be_kept,
    ray_rules.replicas_find_room,
    ray_rules.gpus_of_a_pod_share_memory,
    ray_rules.pods_wait_for_their_replicas,
    ray_rules.nodes_with_records_stay,
    ray_rules.ray_asks_for_a_token,
    pod_rules.pods_are_probed,
)
