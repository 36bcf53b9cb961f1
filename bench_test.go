package aegis_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats.go"
)

type order struct {
	SKU string `json:"sku"`
	Qty int    `json:"qty"`
}
type receipt struct {
	ID    string  `json:"id"`
	Total float64 `json:"total"`
}

// versus runs b.N operations of aegis and as many of the baseline, in turns, so that both meet the same noise, and reports
// the medians over the turns; x-raw is the median of the turns' ratios of operations per second.
func versus(b *testing.B, callers int, ours, raw func() error) {
	b.Helper()
	const turns = 11
	n := max(b.N/turns, 1)
	load(b, callers, min(n, 5000), ours) // fill pools
	load(b, callers, min(n, 5000), raw)
	var a, r [turns]sample
	var ratios []float64
	for i := range turns {
		a[i] = load(b, callers, n, ours)
		r[i] = load(b, callers, n, raw)
		ratios = append(ratios, a[i].rate/r[i].rate)
	}
	report := func(prefix string, s []sample) {
		b.ReportMetric(median(s, func(s sample) float64 { return s.rate }), prefix+"req/s")
		b.ReportMetric(median(s, func(s sample) float64 { return s.p50 }), prefix+"p50-µs")
		b.ReportMetric(median(s, func(s sample) float64 { return s.p99 }), prefix+"p99-µs")
		b.ReportMetric(median(s, func(s sample) float64 { return s.allocs }), prefix+"allocs/op")
		b.ReportMetric(median(s, func(s sample) float64 { return s.cpu }), prefix+"cpu-µs")
	}
	report("", a[:])
	report("raw-", r[:])
	b.ReportMetric(median(ratios, func(f float64) float64 { return f }), "x-raw")
	b.ReportMetric(0, "ns/op")
}

type sample struct{ rate, p50, p99, allocs, cpu float64 }

func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func median[T any](s []T, of func(T) float64) float64 {
	var v []float64
	for _, x := range s {
		v = append(v, of(x))
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// load makes n calls of fn from so many callers, and measures them.
func load(b *testing.B, callers, n int, fn func() error) sample {
	latencies := make([][]time.Duration, callers)
	each := (n + callers - 1) / callers
	for i := range latencies {
		latencies[i] = make([]time.Duration, 0, each)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cpu := cpuTime()
	start := time.Now()
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for range each {
				t := time.Now()
				if err := fn(); err != nil {
					b.Error(err)
					return
				}
				latencies[i] = append(latencies[i], time.Since(t))
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	cpu = cpuTime() - cpu
	runtime.ReadMemStats(&after)
	all := slices.Concat(latencies...)
	if len(all) == 0 {
		b.FailNow()
	}
	slices.Sort(all)
	micros := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	return sample{
		rate:   float64(len(all)) / took.Seconds(),
		p50:    micros(all[len(all)/2]),
		p99:    micros(all[len(all)*99/100]),
		cpu:    micros(cpu) / float64(len(all)),
		allocs: float64(after.Mallocs-before.Mallocs) / float64(len(all)),
	}
}

func BenchmarkCall(b *testing.B) {
	srv := startServer(b)
	svc, _ := aegis.New("order-service", aegis.WithURL(srv.ClientURL()), aegis.WithPool(1))
	aegis.Handle(svc, "create_order", func(ctx context.Context, o order) (receipt, error) {
		return receipt{ID: o.SKU}, nil
	})
	if err := svc.Start(b.Context()); err != nil {
		b.Fatal(err)
	}
	defer svc.Stop(context.Background())
	a, _ := nats.Connect(srv.ClientURL())
	defer a.Close()
	a.QueueSubscribe("rpc.order-service.create_order_raw", "x", func(m *nats.Msg) { m.Respond(m.Data) })
	a.Flush()
	for _, n := range []int{1, 256} {
		for _, pool := range []int{1, 2, 4} {
			b.Run(fmt.Sprintf("callers=%d/pool=%d", n, pool), func(b *testing.B) {
				cl, _ := aegis.New("client", aegis.WithURL(srv.ClientURL()), aegis.WithPool(pool))
				defer cl.Stop(context.Background())
				c, _ := nats.Connect(srv.ClientURL())
				defer c.Close()
				data := make([]byte, 32)
				versus(b, n, func() error {
					_, err := aegis.Call[order, receipt](context.Background(), cl, "order-service", "create_order", order{"ABC", 3})
					return err
				}, func() error {
					_, err := c.Request("rpc.order-service.create_order_raw", data, 5*time.Second)
					return err
				})
			})
		}
	}
}
