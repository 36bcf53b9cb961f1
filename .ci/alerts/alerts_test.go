// Package alerts tests the alert rules in alerts.yml with Prometheus's own engine, the one of promtool test rules.
package alerts

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/promqltest"
)

// Each series has a sample every 15 s; "_" is a scrape that failed. "0x40" is 41 times 0, and "0+5x40" rises by 5 each time.
const load = "load 15s\n"

func up(service, instance, samples string) string {
	return fmt.Sprintf("  aegis_uptime_seconds{service=%q,instance=%q} %s\n", service, instance, samples)
}

func leader(instance, samples string) string {
	return fmt.Sprintf("  aegis_leader{service=\"orders\",group=\"default\",instance=%q} %s\n", instance, samples)
}

func requests(code, samples string) string {
	return fmt.Sprintf("  aegis_requests_total{service=\"orders\",kind=\"rpc\",endpoint=\"create\",code=%q} %s\n", code, samples)
}

func deadLetters(samples string) string {
	return "  aegis_dead_letters_total{service=\"orders\",kind=\"event\",endpoint=\"payment.*\"} " + samples + "\n"
}

// rules returns the expressions of the rules in alerts.yml, by name.
func rules(t *testing.T) map[string]string {
	text, err := os.ReadFile("alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	groups, errs := rulefmt.Parse(text, false, model.UTF8Validation)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	all := map[string]string{}
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			all[r.Alert] = r.Expr
		}
	}
	return all
}

func TestAlerts(t *testing.T) {
	all := rules(t)
	tested := map[string]bool{}
	for _, c := range []struct {
		name, load string
		at         time.Duration
		fire       []string // the alerts that fire; no others may
	}{
		{"all is well", up("orders", "a", "0+15x80") + leader("a", "1x80") + requests("", "0+100x80") + requests("INTERNAL", "0x80") + deadLetters("0x80"), 20 * time.Minute, nil},
		{"one of two instances is gone", up("orders", "a", "0+15x40") + up("orders", "b", "0+15x80"), 20 * time.Minute, nil},
		{"every instance is gone", up("orders", "a", "0+15x40 _x40") + up("orders", "b", "0+15x40 _x40") + up("risk", "c", "0+15x80"), 20 * time.Minute, []string{"NobodyThere"}},
		{"the others lead", leader("a", "0x80") + leader("b", "1x80"), 20 * time.Minute, nil},
		{"nobody leads", leader("a", "1x40 0x40") + leader("b", "0x80"), 20 * time.Minute, []string{"NobodyLeads"}},
		{"nobody has ever led", leader("a", "0x80") + leader("b", "0x80"), 20 * time.Minute, []string{"NobodyLeads"}},
		{"the leader is gone, and so are all the others", up("orders", "a", "0+15x40 _x40") + leader("a", "1x40 _x40"), 20 * time.Minute, []string{"NobodyLeads", "NobodyThere"}},
		{"orders are rejected", requests("", "0+100x80") + requests("NO_FUNDS", "0+50x80") + requests("NOT_FOUND", "0+50x80") + requests("INVALID_ARGUMENT", "0+50x80"), 20 * time.Minute, nil},
		{"handlers fail", requests("", "0+100x80") + requests("INTERNAL", "0+5x80"), 20 * time.Minute, []string{"Failures"}},
		{"requests are shed", requests("", "0+100x80") + requests("OVERLOADED", "0+5x80"), 20 * time.Minute, []string{"Failures"}},
		{"few handlers fail", requests("", "0+1000x80") + requests("INTERNAL", "0+5x80"), 20 * time.Minute, nil},
		{"100 failures between two scrapes, the first ever", requests("", "0x80") + requests("INTERNAL", "0x76 100x3"), 20 * time.Minute, []string{"Failures"}},
		{"an event is set aside", deadLetters("0x76 1x3"), 20 * time.Minute, []string{"DeadLetters"}},
		{"an event was set aside long ago", deadLetters("1x80"), 20 * time.Minute, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			storage := promqltest.LoadedStorage(t, load+c.load)
			defer storage.Close()
			engine := promqltest.NewTestEngine(t, false, 5*time.Minute, promqltest.DefaultMaxSamplesPerQuery)
			var fire []string
			for name, expr := range all {
				q, err := engine.NewInstantQuery(context.Background(), storage, nil, expr, time.Unix(0, 0).Add(c.at))
				if err != nil {
					t.Fatal(name, err)
				}
				result := q.Exec(context.Background())
				v, err := result.Vector()
				if err != nil {
					t.Fatal(name, err)
				}
				if len(v) > 0 {
					fire = append(fire, name)
					tested[name] = true
				}
				for _, s := range v {
					if s.Metric.Get("service") != "orders" {
						t.Errorf("%s fires for %s", name, s.Metric)
					}
				}
			}
			slices.Sort(fire)
			if !slices.Equal(fire, c.fire) {
				t.Errorf("%s fire; want %s", strings.Join(fire, ", "), strings.Join(c.fire, ", "))
			}
		})
	}
	for name := range all {
		if !tested[name] {
			t.Errorf("no case makes %s fire", name)
		}
	}
}
