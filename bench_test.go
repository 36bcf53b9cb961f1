package aegis_test

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

func startServer(tb testing.TB) *server.Server {
	tb.Helper()
	srv, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true})
	if err != nil {
		tb.Fatal(err)
	}
	srv.Start()
	if !srv.ReadyForConnections(5 * time.Second) {
		tb.Fatal("server not ready")
	}
	tb.Cleanup(func() { srv.Shutdown(); srv.WaitForShutdown() })
	return srv
}

type order struct {
	SKU string  `json:"sku"`
	Qty int     `json:"qty"`
	Px  float64 `json:"px"`
}
type receipt struct {
	ID    string `json:"id"`
	Total float64 `json:"total"`
}

func run(b *testing.B, callers int, fn func()) {
	lat := make([][]time.Duration, callers)
	var wg sync.WaitGroup
	var m0, m1 runtime.MemStats
	per := (b.N + callers - 1) / callers
	runtime.ReadMemStats(&m0)
	b.ResetTimer()
	for i := range callers {
		l := make([]time.Duration, 0, per)
		wg.Go(func() {
			for range per {
				t := time.Now()
				fn()
				l = append(l, time.Since(t))
			}
			lat[i] = l
		})
	}
	wg.Wait()
	b.StopTimer()
	runtime.ReadMemStats(&m1)
	all := slices.Concat(lat...)
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)/2].Nanoseconds())/1e3, "p50-µs")
	b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds())/1e3, "p99-µs")
	b.ReportMetric(float64(len(all))/b.Elapsed().Seconds(), "req/s")
	b.ReportMetric(float64(m1.Mallocs-m0.Mallocs)/float64(len(all)), "allocs/rt")
}

func BenchmarkX(b *testing.B) {
	for _, n := range []int{1, 256} {
		for _, pool := range []int{1, 2, 4} {
			b.Run("aegis/"+string(rune('0'+pool)), func(b *testing.B) {
				srv := startServer(b)
				svc, _ := aegis.New("order-service", aegis.WithURL(srv.ClientURL()), aegis.WithPool(pool))
				aegis.Handle(svc, "create_order", func(ctx context.Context, o order) (receipt, error) {
					return receipt{ID: o.SKU, Total: o.Px * float64(o.Qty)}, nil
				})
				if err := svc.Start(b.Context()); err != nil {
					b.Fatal(err)
				}
				cl, _ := aegis.New("client", aegis.WithURL(srv.ClientURL()), aegis.WithPool(pool))
				run(b, n, func() {
					if _, err := aegis.Call[order, receipt](context.Background(), cl, "order-service", "create_order", order{"ABC", 3, 1.5}); err != nil {
						b.Error(err)
					}
				})
				cl.Stop(context.Background())
				svc.Stop(context.Background())
			})
		}
		b.Run("raw", func(b *testing.B) {
			srv := startServer(b)
			a, _ := nats.Connect(srv.ClientURL())
			c, _ := nats.Connect(srv.ClientURL())
			defer a.Close()
			defer c.Close()
			a.QueueSubscribe("rpc.x.y", "x", func(m *nats.Msg) { m.Respond(m.Data) })
			a.Flush()
			data := make([]byte, 32)
			run(b, n, func() { c.Request("rpc.x.y", data, 5*time.Second) })
		})
	}
}
